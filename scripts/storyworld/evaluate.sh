#!/usr/bin/env bash
# Measures a model on 100 held-out stories: bash scripts/storyworld/evaluate.sh [key=value ...]
# The overrides are those of configs/storyworld/trial.yaml, such as model=outputs/storyworld/sft/model.
#
#   PYTHON    the interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}

for task in fixed extension no_context sliding middle; do
  "$python" -m mask2dit.storyworld.trial task=$task output_dir=outputs/storyworld/trials/$task "$@"
done
"$python" -m mask2dit.storyworld.trial mask_variant=v1 output_dir=outputs/storyworld/trials/fixed_v1 "$@"
"$python" -m mask2dit.storyworld.report

#!/usr/bin/env bash
# Measures a model on 200 new stories and 200 with unseen combinations: bash scripts/storyworld/evaluate.sh [key=value ...]
# The overrides are those of configs/storyworld/trial.yaml, such as model=outputs/storyworld/sft/model.
#
#   PYTHON    the interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
interval="guidance_interval=[250,1000]"  # where scenes are given

for split in train held_out; do
  trial=("$python" -m mask2dit.storyworld.trial split=$split stories=reporting num_stories=200)
  for task in fixed no_context; do
    "${trial[@]}" task=$task output_dir=outputs/storyworld/trials/$split/$task "$@"
  done
  for task in extension sliding middle; do
    "${trial[@]}" "$interval" task=$task output_dir=outputs/storyworld/trials/$split/$task "$@"
    "${trial[@]}" "$interval" context_guidance=true task=$task \
      output_dir=outputs/storyworld/trials/$split/${task}_context "$@"
  done
  "${trial[@]}" mask_variant=v1 output_dir=outputs/storyworld/trials/$split/fixed_v1 "$@"
done
"$python" -m mask2dit.storyworld.report

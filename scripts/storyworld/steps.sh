#!/usr/bin/env bash
# How a model's samplers do in few steps, on new stories: bash scripts/storyworld/steps.sh [key=value ...]
# The overrides are those of configs/storyworld/trial.yaml, such as model=outputs/storyworld/sft/model.
#
#   PYTHON    the interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}

for sampler in ddim dpm; do
  for steps in 4 6 10 15 30 50; do
    "$python" -m mask2dit.storyworld.trial split=train sampler=$sampler num_inference_steps=$steps \
      output_dir=outputs/storyworld/trials/steps/${sampler}_$steps "$@"
  done
done
"$python" -m mask2dit.storyworld.report

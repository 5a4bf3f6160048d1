#!/usr/bin/env bash
# Compares samplers, numbers of steps and guidance on new stories: bash scripts/storyworld/steps.sh [key=value ...]
# The overrides are those of configs/storyworld/trial.yaml, such as model=outputs/storyworld/sft/model.
#
#   PYTHON    the interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}

trial=("$python" -m mask2dit.storyworld.trial split=train)
trials=outputs/storyworld/trials/steps

for sampler in ddim dpm; do
  for steps in 4 6 10 15 30 50; do
    "${trial[@]}" sampler=$sampler num_inference_steps=$steps output_dir=$trials/${sampler}_$steps "$@"
  done
done
for interval in 0,500 200,800 500,1000; do
  "${trial[@]}" "guidance_interval=[$interval]" output_dir=$trials/dpm_10_$interval "$@"
done
for scale in 1 1.5 3 4; do
  "${trial[@]}" guidance_scale=$scale output_dir=$trials/dpm_10_scale_$scale "$@"
done
"$python" -m mask2dit.storyworld.report

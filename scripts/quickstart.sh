#!/usr/bin/env bash
# Sets up .venv and generates a first video of three scenes with the small world's weights. Arguments are overrides (key=value).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
exec .venv/bin/python examples/cogvideox_fun/predict_multi_scene_t2v_mask2dit.py \
  configs/inference/fixed_scene_small.yaml "$@"

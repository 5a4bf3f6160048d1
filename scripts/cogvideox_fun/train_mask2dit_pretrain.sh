#!/usr/bin/env bash
# Pre-training on concatenated unrelated clips, with configs/train/pretrain.yaml. Arguments are overrides (key=value); the
# environment variables of scripts/train.sh set where it runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec bash scripts/train.sh configs/train/pretrain.yaml "$@"

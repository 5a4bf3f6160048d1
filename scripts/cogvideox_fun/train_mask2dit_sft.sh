#!/usr/bin/env bash
# Supervised fine-tuning on consecutive scenes, with configs/train/sft.yaml. Arguments are overrides (key=value); the
# environment variables of scripts/train.sh set where it runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec bash scripts/train.sh configs/train/sft.yaml "$@"

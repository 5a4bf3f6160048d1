#!/usr/bin/env bash
# Measures everything that needs a GPU, and writes the GPU parts of benchmarks/RESULTS.md and the README.
# Arguments go to benchmarks/gpu.py: --tiny for small sizes, --model FOLDER for the memory modes, --parts to select.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"

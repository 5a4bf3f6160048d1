#!/usr/bin/env bash
# Creates .venv with what requirements.txt pins and this package in it. Run again, it does nothing.
# PYTHON names the interpreter, python3.11 unless set.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
if ! command -v "$python" >/dev/null; then
  echo "error: there is no $python: install Python 3.11, or name another one with PYTHON=..." >&2
  exit 1
fi

wanted=$(cat requirements.txt setup.py | cksum)
if [ "$(cat .venv/.installed 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
echo "Installing into .venv (a few minutes) ..."
"$python" -m venv .venv
# torch by itself and first: a build for the CPU that is at hand is taken, and not replaced by what another package wants.
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
# Only the file of CLIP's vocabulary is read from it: with its requirements it would bring another build of torch.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps open_clip_torch==3.3.0
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
echo "$wanted" >.venv/.installed

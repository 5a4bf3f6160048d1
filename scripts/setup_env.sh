#!/usr/bin/env bash
# Creates .venv with the packages that requirements.txt pins, and this package in editable mode. Skips an up-to-date .venv.
#
#   PYTHON  the interpreter; by default the first of python3.11, python3.12, python3.13, python3 and python that is 3.11 to 3.13
set -euo pipefail
cd "$(dirname "$0")/.."

is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

candidates=(python3.11 python3.12 python3.13 python3 python)
[ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
python=
for candidate in "${candidates[@]}"; do
  if is_supported "$candidate"; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: ${PYTHON:-no python on PATH} is not Python 3.11, 3.12 or 3.13: install one, or name it with PYTHON=..." >&2
  exit 1
fi

wanted=$(cat requirements.txt pyproject.toml | cksum)
if [ "$(cat .venv/.installed 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
echo "Installing into .venv with $python (a few minutes) ..."
"$python" -m venv .venv
# torch is installed first and alone, so that an available CPU build is used and no other package's requirement replaces it.
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
echo "$wanted" >.venv/.installed

#!/usr/bin/env bash
# Sets up .venv and runs the tests in parallel on up to four cores. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
exec .venv/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal "$@"

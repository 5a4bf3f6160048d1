#!/usr/bin/env bash
# Measures long stories by the choice of their context: bash scripts/storyworld/contexts.sh [key=value ...]
# The overrides are those of configs/storyworld/trial.yaml, such as num_stories=40.
#
#   PYTHON    the interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/../.."
trial=("${PYTHON:-python}" -m mask2dit.storyworld.trial split=train stories=reporting)
trials=outputs/storyworld/trials/contexts
guidance=(context_guidance=true "guidance_interval=[250,1000]")

for context in last anchor cast; do
  "${trial[@]}" "${guidance[@]}" task=return context=$context output_dir=$trials/return_$context "$@"
  "${trial[@]}" "${guidance[@]}" task=drift context=$context output_dir=$trials/drift_$context "$@"
done
"${trial[@]}" task=return_no_context output_dir=$trials/return_no_context "$@"

#!/usr/bin/env bash
# Copy what is worth keeping of finished runs into results/: experiments/collect.sh SUITE RUN_FOLDER...
# Rows, recipe, environment (with the commit), tables and picture; adapters and checkpoints stay out of git.
set -euo pipefail
suite=${1:?"usage: collect.sh SUITE RUN_FOLDER..."}
shift
for run in "$@"; do
  grep -q '"finished": true' "$run/state.json" || { echo "$run has not finished" >&2; exit 1; }
  target=results/$suite/$(basename "$run")
  mkdir -p "$target"
  cp "$run"/{recipe.toml,env.json,rows.jsonl,table.md,report.md,curve.svg} "$target"/
done

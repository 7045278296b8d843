#!/usr/bin/env bash
# Copy the finished runs of a plan into results/: experiments/collect_plan.sh SUITE PLAN_FOLDER
# Rows (gzipped without a time stamp), recipe and environment of each run. `out` in the recipe says where the run lay on the
# machine it ran on; it is written relative, whatever the command line said.
set -euo pipefail
suite=${1:?"usage: collect_plan.sh SUITE PLAN_FOLDER"}
plan=${2:?"usage: collect_plan.sh SUITE PLAN_FOLDER"}
for run in "$plan"/*/; do
  run=${run%/}
  grep -qs '"finished": true' "$run/state.json" || { echo "$run has not finished: left out" >&2; continue; }
  target=results/$suite/$(basename "$plan")/$(basename "$run")
  mkdir -p "$target"
  sed "s#^out = .*#out = \"build/streams/$(basename "$plan")\"#" "$run/recipe.toml" > "$target/recipe.toml"
  cp "$run/env.json" "$target/"
  gzip -9nc "$run/rows.jsonl" > "$target/rows.jsonl.gz"
done

#!/bin/sh
# Starts a run, shows its log, and exits with 0 only if the federation really ended.
@HEAD@
told=$("$here/flwr.sh" run "$here/../app" here --format json)
run=$(printf '%s' "$told" | sed -n 's/.*"run-id": *"\{0,1\}\([0-9][0-9]*\).*/\1/p')
[ -n "$run" ] || { echo "the run was not taken: $told" >&2; exit 1; }
echo "run $run; Ctrl-C ends this log and not the run, which ./flwr.sh stop $run does"
trap 'exit 130' INT
while :; do
  "$here/flwr.sh" log "$run" here --stream || true # it may break off: what counts is the status
  status=$("$here/flwr.sh" list --run-id "$run" --format json | sed -n 's/.*"status": *"\([^"]*\)".*/\1/p' | head -n 1)
  case "$status" in
    finished:completed) exit 0 ;;
    finished:*) echo "the federation did not end: $status" >&2; exit 1 ;;
  esac
  sleep 5
done

#!/bin/sh
# Starts a run, shows its log, and exits with 0 only if the federation really ended.
@HEAD@
told=$("$here/flwr.sh" run "$here/../app" here --format json)
run=$(printf '%s' "$told" | sed -n 's/.*"run-id": *"\{0,1\}\([0-9][0-9]*\).*/\1/p')
[ -n "$run" ] || { echo "the run was not taken: $told" >&2; exit 1; }
echo "run $run; Ctrl-C ends this log and not the run, which ./flwr.sh stop $run does"
trap 'exit 130' INT
shown='' missed=0
while :; do
  told=$("$here/flwr.sh" list --run-id "$run" --format json 2>&1) || true
  status=$(printf '%s' "$told" | sed -n 's/.*"status": *"\([^"]*\)".*/\1/p' | head -n 1)
  if [ -z "$status" ]; then
    missed=$((missed + 1))
    [ "$missed" -gt 1 ] || printf '%s\n' "$told" >&2 # Flower's words, the first time
    echo "no answer from SuperLink, $missed in a row; asked again in 5 s" >&2
    sleep 5
    continue
  fi
  case "$shown$status" in
    shown:finished:completed) exit 0 ;;
    shown:finished:*) echo "the federation did not end: $status" >&2; exit 1 ;;
  esac
  [ "$missed" = 0 ] || echo "SuperLink answers again; the log from its beginning:" >&2
  shown='' missed=0
  # if it breaks off, Flower has said so
  if "$here/flwr.sh" log "$run" here --stream; then shown=shown:; else missed=1; sleep 5; fi
done

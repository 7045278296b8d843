#!/bin/sh
# Starts the SuperNode of site @SITE@; its worker starts with the first message, and ends with the SuperNode.
@HEAD@
@FIND@
python=$(dirname -- "$(command -v "$program")")/python3
[ -x "$python" ] || python=python3
# in a session of its own: a Ctrl-C would reach it twice, and to a second signal it ends without taking leave of SuperLink
setsid flower-supernode --superlink "@ADDRESS@" --root-certificates "$here/ca.pem" \
  --auth-supernode-private-key "$here/node.key" --host 127.0.0.1 --port @RUNTIME@ \
  --node-config "site-config=\"$here/site.toml\"" &
node=$!
trap '"$python" -m fedkeel.engines.worker "$here/site.toml" stop || true' EXIT
# any of them goes on as TERM: what a shell starts with & may be deaf to INT
trap 'trap "" HUP INT TERM; kill -TERM "$node" 2> /dev/null || true; wait "$node" && exit 0 || exit $?' HUP INT TERM
wait "$node" && exit 0 || exit $?

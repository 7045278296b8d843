#!/bin/sh
# Registers keys/NAME.pub of the sites named, or of all: they may take part, under that name.
@HEAD@
[ $# -gt 0 ] || for key in "$here"/keys/*.pub; do set -- "$@" "$(basename "$key" .pub)"; done
failed=0
for name in "$@"; do
  told=$("$here/flwr.sh" supernode register "$here/keys/$name.pub" --name "$name" --format json 2>&1) || true
  node=$(printf '%s' "$told" | sed -n 's/.*"node-id": *"\{0,1\}\([0-9][0-9]*\).*/\1/p')
  if [ -n "$node" ]; then
    echo "$node $name" >> "$here/state/@MEMBERS@"
    echo "$name: registered, node $node"
  else
    echo "not registered: $name: $told" >&2
    failed=1
  fi
done
exit $failed

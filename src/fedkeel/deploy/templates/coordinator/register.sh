#!/bin/sh
# Registers keys/NAME.pub of the sites named, or of all: they may take part, under that name. One that is registered stays so.
@HEAD@
[ $# -gt 0 ] || for key in "$here"/keys/*.pub; do set -- "$@" "$(basename "$key" .pub)"; done
mkdir -p "$here/state/registered"
failed=0
for name in "$@"; do
  key="$here/keys/$name.pub" taken="$here/state/registered/$name.pub"
  told=$("$here/flwr.sh" supernode register "$key" --name "$name" --format json 2>&1) || true
  node=$(printf '%s' "$told" | sed -n 's/.*"node-id": *"\{0,1\}\([0-9][0-9]*\).*/\1/p')
  if [ -n "$node" ]; then
    echo "$node $name" >> "$here/state/@MEMBERS@"
    cp "$key" "$taken"
    echo "$name: registered, node $node"
    continue
  fi
  # Flower refuses every key that it has seen: it is this name's if it is the one taken then and its node was not revoked since
  if cmp -s "$key" "$taken"; then
    node=$(awk -v name="$name" '$2 == name { node = $1 } END { print node }' "$here/state/@MEMBERS@")
    if "$here/flwr.sh" supernode list --format json 2>&1 | grep -q "\"node-id\": *\"$node\""; then
      echo "$name: registered already, node $node"
      continue
    fi
  fi
  echo "not registered: $name: $told" >&2
  failed=1
done
exit $failed

#!/bin/sh
# Starts the SuperNode of site @SITE@; its worker starts with the first message.
@HEAD@
@FIND@
exec flower-supernode --superlink "@ADDRESS@" --root-certificates "$here/ca.pem" \
  --auth-supernode-private-key "$here/node.key" --host 127.0.0.1 --port @RUNTIME@ \
  --node-config "site-config=\"$here/site.toml\""

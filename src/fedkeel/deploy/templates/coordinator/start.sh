#!/bin/sh
# Starts SuperLink, on this machine's loopback address only: the gate is what sites reach.
@HEAD@
@FIND@
cd "$here/state"
exec flower-superlink --host 127.0.0.1 --port @INNER@ \
  --ssl-certfile "$here/tls.pem" --ssl-keyfile "$here/tls.key" --ssl-ca-certfile "$here/ca.pem" \
  --enable-supernode-auth --disable-runtime-dependency-installation --database "$here/state/superlink.db"

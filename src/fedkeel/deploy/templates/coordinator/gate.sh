#!/bin/sh
# Starts the gate: nginx, in the foreground.
@HEAD@
@FIND@
exec nginx -p "$here" -c "$here/gate.conf" -e stderr -g "daemon off;"

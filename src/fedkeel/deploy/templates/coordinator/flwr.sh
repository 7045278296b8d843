#!/bin/sh
# Flower's own command, against this SuperLink: ./flwr.sh supernode list
@HEAD@
@FIND@
cat > "$FLWR_HOME/config.toml" <<END
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:@INNER@"
root-certificates = "$here/ca.pem"
END
exec flwr "$@"

set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
umask 077
mkdir -p "$here/state/flwr"
export FLWR_HOME="$here/state/flwr"
# no telemetry, no update check, no installing at run time, no look at a hub
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

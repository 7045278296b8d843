set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
state=$here/state
[ -d "$state" ] || state=$here
# by numbers, as a container's user may have no name; what another user leaves in state/ its owner cannot open again
# shellcheck disable=SC2012 # one folder, and no column before its name holds a space
owner=$(ls -ldn "$state" | awk '{ print $3 }')
if [ "$owner" != "$(id -u)" ]; then
  # shellcheck disable=SC2012
  owner=$(ls -ld "$state" | awk '{ print $3 }')
  echo "this is $owner's: sudo -u $owner $here/$(basename -- "$0")${*:+ $*}" >&2
  exit 1
fi
umask 077
mkdir -p "$here/state/flwr"
export FLWR_HOME="$here/state/flwr"
# the user's cache where there is one: a system user may have no home, and a unit may not write to it
cache=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}
[ -d "$cache/fedkeel" ] || export FEDKEEL_CACHE="${FEDKEEL_CACHE:-$here/state/cache/fedkeel}"
[ -d "$cache/huggingface" ] || export HF_HOME="${HF_HOME:-$here/state/cache/huggingface}"
# no telemetry, no update check, no installing at run time, no look at a hub
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

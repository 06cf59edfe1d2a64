#!/usr/bin/env bash
# Installs the lowest versions that the packages allow, build tools included, into target/lowest and
# runs pytest there with the arguments given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv="$PWD/.venv/bin/uv"
environment=target/lowest
[[ -x $uv ]] || { echo "error: .venv/bin/uv is missing, make install brings it" >&2; exit 2; }

"$uv" venv --quiet --clear "$environment"
"$uv" pip install --python "$environment" --resolution lowest-direct \
    --build-constraint <(echo "maturin==1.9.4"; echo "hatchling==1.27.0") \
    --editable ".[cuda,dev,tensorrt-rtx]" ./runtime
"$uv" pip list --python "$environment" --quiet
exec "$environment/bin/pytest" "$@"

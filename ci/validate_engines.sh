#!/usr/bin/env bash
# Builds the demo model and the models given for the targets cuda, onnxruntime-cuda, tensorrt and
# tensorrt-rtx, those that this host can build for, validates the engines as far as it can, generates with
# ONNX Runtime's chain and, where there is a GPU, with the chain over the engines; there it also runs the
# tests marked gpu.
# Writes report.json and report.md. Exit code: 0 all held, 1 something failed, 2 a wrong argument, 3 all
# held but engines were not executed for want of a GPU; --allow-no-gpu makes 3 a 0. SEDAC_BIN is the
# directory of python, sedac-export and sedac-runtime where that is not .venv/bin.
set -euo pipefail

usage="usage: ci/validate_engines.sh [--allow-no-gpu] [--precision fp16|bf16|fp32] [--output DIRECTORY] [MODEL ...]"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bin="${SEDAC_BIN:-$root/.venv/bin}"
output="$root/target/validate_engines"
precision=fp16
allow_no_gpu=()
models=("$root/demo/model")

refuse() {
    echo "error: $1; $usage" >&2
    exit 2
}

while (($#)); do
    case "$1" in
        --allow-no-gpu) allow_no_gpu=(--allow-no-gpu) ;;
        --precision | --output)
            (($# > 1)) || refuse "$1 takes a value"
            if [[ $1 == --precision ]]; then precision="$2"; else output="$2"; fi
            shift
            ;;
        --help | -h) echo "$usage"; exit 0 ;;
        -*) refuse "there is no option $1" ;;
        *) models+=("$1") ;;
    esac
    shift
done
[[ $precision =~ ^(fp16|bf16|fp32)$ ]] || refuse "--precision $precision is none of fp16, bf16, fp32"
[[ -x $bin/sedac-export ]] || refuse "$bin/sedac-export is missing, make demo installs it"

targets=(tensorrt tensorrt-rtx)
[[ $precision == fp32 ]] || targets=(cuda onnxruntime-cuda "${targets[@]}") # these take 16 bits

mkdir -p "$output"
rm -rf "$output"/run-* "$output"/gpu_tests.*
number=0
for model in "${models[@]}"; do
    for target in "${targets[@]}"; do
        number=$((number + 1))
        run="$output/run-$number"
        mkdir "$run"
        name="${model%/}"
        [[ $name != "$root/demo/model" ]] || name=demo
        echo "${name##*/}" > "$run/model"
        echo "$target" > "$run/target"
        echo "== $model for $target" >&2
        # each step is judged by the report, which knows what a host without a GPU cannot do
        "$bin/python" "$root/ci/report.py" installed "$target" 2> "$run/build.log" || continue
        "$bin/sedac-export" build --model "$model" --precision "$precision" --target "$target" \
            --output "$run/bundle" 2> >(tee "$run/build.log" >&2) || continue
        "$bin/sedac-export" validate "$run/bundle" --target "$target" --json > "$run/validate.json" ||
            echo "validate ended with exit code $?" >&2
        "$bin/sedac-runtime" generate --engines "$run/bundle" --prompt "def main():" --mode full \
            --max-new-tokens 32 --json > "$run/generate.json" || echo "generate failed" >&2
        backend=(--backend "$target")
        [[ $target != onnxruntime-cuda ]] || backend=(--backend onnxruntime --device cuda)
        "$bin/sedac-runtime" generate --engines "$run/bundle" --prompt "def main():" --mode full \
            --max-new-tokens 32 --json "${backend[@]}" > "$run/plans.json" 2> "$run/plans.log" ||
            echo "not generated over the engines: $(tail -n 1 "$run/plans.log")" >&2
        rm -rf "$run/bundle"
    done
done
if nvidia-smi > /dev/null 2>&1; then
    echo "== tests on the GPU" >&2
    code=0
    mapfile -t tests < <(cd "$root" && grep -rl --include="test_*.py" "mark\.gpu" tests)
    (cd "$root" && "$bin/python" -m pytest -m gpu "${tests[@]}") > "$output/gpu_tests.log" 2>&1 || code=$?
    echo "$code" > "$output/gpu_tests.code"
    tail -n 1 "$output/gpu_tests.log" >&2
fi
"$bin/python" "$root/ci/report.py" write "$output" "${allow_no_gpu[@]}"

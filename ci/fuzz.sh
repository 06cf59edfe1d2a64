#!/usr/bin/env bash
# Fuzzes bundles, from opening one to its first tokens, until something is found. Arguments go to the
# fuzzer, such as -max_total_time=600. Needs cargo-fuzz and a nightly compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
find_library="from sedac_runtime.library import find_onnxruntime; print(find_onnxruntime())"
ORT_DYLIB_PATH="$(.venv/bin/python -c "$find_library")"
export ORT_DYLIB_PATH
# what is new goes to the first directory; ONNX Runtime keeps memory until the process ends
mkdir -p target/corpus
exec cargo +nightly fuzz run --fuzz-dir sedac-core/fuzz first_token \
    target/corpus sedac-core/fuzz/corpus/first_token -- \
    -detect_leaks=0 -timeout=10 -rss_limit_mb=2048 -max_len=65536 "$@"

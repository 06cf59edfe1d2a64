#!/usr/bin/env bash
# Runs the core's tests, then those of the binding, with AddressSanitizer, which ends them at the first
# access to memory that is not the core's own. Arguments go to pytest in place of the tests below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=x86_64-unknown-linux-gnu
tests=(-m "not rotating" tests/test_runtime.py tests/test_plans_backend.py tests/test_decisions.py)
(($#)) && tests=("$@")
[[ -x .venv/bin/pytest ]] || { echo "error: .venv/bin/pytest is missing, make install brings it" >&2; exit 2; }

# sanitizers are no stable feature of the compiler; the pinned one has them all the same
export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/sanitize
# Python and the libraries it loads keep memory until the process ends; tests ask for more than there is
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
cargo test --workspace --locked --target "$target"

cargo build --package sedac-core --lib --features python --locked --target "$target"
packages="$CARGO_TARGET_DIR/python"
rm -rf "$packages"
mkdir "$packages"
cp -r runtime/sedac_runtime "$packages"
cp "$CARGO_TARGET_DIR/$target/debug/libsedac_core.so" "$packages/sedac_runtime/_core.abi3.so"
# Python is not linked with the sanitizer's library, which has to come first and wants C++'s with it.
# What it has to say must not be caught with the tests' own output.
preload="$(cc -print-file-name=libasan.so):$(cc -print-file-name=libstdc++.so)"
LD_PRELOAD="$preload" PYTHONPATH="$packages" .venv/bin/pytest --capture=sys "${tests[@]}"

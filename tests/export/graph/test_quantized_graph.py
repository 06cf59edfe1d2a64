"""Graphs of quantized bundles: what becomes of their products, and of their rows' bits."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from build_cache import BuildCache
from onnx import helper
from tiny_models import save_tiny_model

from sedac_export import BuildRequest
from sedac_export.bundle import Bundle
from sedac_export.bundle.runner import BundleRunner
from sedac_export.graph.quantized_graph import layouts
from sedac_export.graph.trace import TracedGraph

LENGTH = 24


def quantized(
    name: str, directory: Path, cache: BuildCache, precision: str = "int4", symmetric: bool = True
) -> Bundle:
    save_tiny_model(name, directory / "model")
    request = BuildRequest(
        model=str(directory / "model"),
        output=directory / "bundle",
        precision=precision,
        block_size=16,
        symmetric=symmetric,
        max_cache_length=LENGTH,
    )
    return Bundle.open(cache.bundle(request))


@pytest.mark.parametrize(("name", "rest"), [("llama", 0), ("qwen2", 0), ("gpt2", 1)])
def test_every_large_weight_is_quantized(
    name: str, rest: int, tmp_path: Path, build_cache: BuildCache
) -> None:
    """Biases beside products, tied heads, and weights that lie the other way; GPT-2's table of
    positions, which is looked up by them, stays."""
    bundle = quantized(name, tmp_path, build_cache)
    used: Counter[str] = Counter()
    for file in bundle.manifest.files:
        if file.endswith(".onnx"):
            used.update(node.op_type for node in bundle.graph(file).graph.node)
    assert used["MatMul"] == used["Gemm"] == 0
    assert used["Gather"] == rest
    assert used["GatherBlockQuantized"] == 1


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_has_the_same_bits_in_passes_of_any_length(
    name: str, precision: str, symmetric: bool, tmp_path: Path, build_cache: BuildCache
) -> None:
    """So that verification gives the tokens of decoding one by one; the last pass ends where the
    cache does."""
    bundle = quantized(name, tmp_path, build_cache, precision, symmetric)
    runner = BundleRunner.of(bundle, threads=2)
    tokens = np.random.default_rng(0).integers(0, 256, LENGTH)
    whole, single = (
        chained(runner, tokens, ends) for ends in ([1, 4, 9, LENGTH], range(1, LENGTH + 1))
    )
    np.testing.assert_array_equal(whole, single)


def chained(runner: BundleRunner, tokens: np.ndarray, ends: object) -> np.ndarray:
    """Logits of `tokens` in passes that end at `ends`."""
    entries = runner.manifest.engines.layers
    caches = [runner.empty_caches(e.first_layer, e.num_layers, LENGTH) for e in entries]
    logits, start = [], 0
    for end in ends:  # type: ignore[attr-defined]
        inputs = runner.begin(slice(start, end))
        x = runner.embed(tokens[start:end], inputs)
        for entry, cache in zip(entries, caches, strict=True):
            x = runner.layers(entry, x, inputs, cache)["y"]
        logits.append(runner.head(x))
        start = end
    return np.concatenate(logits, axis=1)


def test_weights_that_are_also_read_otherwise_stay() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "graph", [], [], [onnx.TensorProto(name="w", data_type=1, dims=[32, 32])]
    )
    assert layouts(TracedGraph(helper.make_model(graph), {"w": "layer.w"})) == {"w": None}

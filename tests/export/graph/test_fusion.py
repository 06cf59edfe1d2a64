"""Merged operators give what those they stand for gave."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyBundle
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sedac_export.arrays import Array
from sedac_export.graph.fusion import fused
from sedac_export.graph.modules import stability
from sedac_export.graph.stamp import with_precision
from sedac_export.graph.trace import TracedGraph, trace

HIDDEN, HEADS = 24, 3


class Layer(nn.Module):
    """Products of one input, heads taken apart and joined, a residual addition and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(HIDDEN))
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.value = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.gate = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = F.rms_norm(x, self.norm.shape, self.norm, 1e-6)
        heads = self.query(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        joined = heads.transpose(1, 2).flatten(2)
        mixed = F.rms_norm(x + joined, self.norm.shape, self.norm, 1e-6)
        gated = F.silu(self.gate(mixed)) * self.value(mixed) + self.value(normed)
        # a change of layout that does come to something
        turned = heads.reshape(*x.shape)
        y = x + self.down(gated) + turned
        return y, stability(x, y)


def traced_layer() -> tuple[TracedGraph, dict[str, Array]]:
    torch.manual_seed(0)
    layer = Layer()
    dynamic = {"x": {1: "tokens"}}
    graph = trace(layer, {"x": torch.randn(1, 4, HIDDEN)}, ["y", "stability"], dynamic)
    return graph, {name: weight.detach().numpy() for name, weight in layer.named_parameters()}


def run(graph: TracedGraph, weights: dict[str, Array], feeds: dict[str, Array]) -> list[Array]:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for initializer in model.graph.initializer:
        if initializer.name in graph.weights:
            kind = helper.tensor_dtype_to_np_dtype(initializer.data_type)
            weight = weights[graph.weights[initializer.name]].astype(kind)
            initializer.CopyFrom(numpy_helper.from_array(weight, initializer.name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    outputs: list[Array] = session.run(None, feeds)
    return outputs


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_layer_computes_the_same(precision: str) -> None:
    whole, weights = traced_layer()
    graph = with_precision(whole, precision)
    merged = TracedGraph(fused(graph.model, {}), graph.weights)
    assert [v.name for v in merged.model.graph.output] == ["y", "stability"]
    rng = np.random.default_rng(0)
    for tokens in (1, 5):
        feeds = {"x": rng.standard_normal((1, tokens, HIDDEN)).astype(np.float32)}
        for got, expected in zip(
            run(merged, weights, feeds), run(graph, weights, feeds), strict=True
        ):
            np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 0.0])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_stability_is_exact(scale: float, offset: float) -> None:
    """Of small changes too, of a residual stream with one large number, and of zeros."""
    whole, weights = traced_layer()
    weights["down.weight"] = weights["down.weight"] * scale
    if scale == 0:
        weights = {name: np.zeros_like(weight) for name, weight in weights.items()}
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 5, HIDDEN)) * (scale > 0)
    x[..., 3] += offset
    feeds = {"x": x.astype(np.float32)}
    y, got = run(TracedGraph(fused(whole.model, {}), whole.weights), weights, feeds)
    x, y = feeds["x"].astype(np.float64), y.astype(np.float64)
    dot, squares = (x * y).sum(-1), (x * x).sum(-1) * (y * y).sum(-1)
    expected = np.where(squares > 0, dot / np.sqrt(np.maximum(squares, 1e-300)) + 1, 0) / 2
    np.testing.assert_allclose(got[..., 0], expected, atol=2e-6)


def test_products_of_one_input_are_one() -> None:
    """query and value of the first norm, but not gate and value of the second, which are wider."""
    graph, _ = traced_layer()
    assert operators(graph.model)["MatMul"] == 5
    counts = operators(fused(graph.model, {}))
    assert (counts["MatMul"], counts["FusedMatMul"], counts["Split"]) == (0, 4, 1)


def test_layouts_that_come_to_nothing_are_dropped() -> None:
    """Only what gives `turned` is left."""
    graph, _ = traced_layer()
    before, after = operators(graph.model), operators(fused(graph.model, {}))
    assert (before["Reshape"], after["Reshape"], after["Transpose"]) == (3, 2, 1)


def test_an_addition_is_merged_with_the_norm_of_its_sum() -> None:
    """The second norm's, which `y` adds to as well."""
    graph, _ = traced_layer()
    counts = operators(fused(graph.model, {}))
    # the last gives what stability is computed from, as the one of the input does
    assert counts["SkipSimplifiedLayerNormalization"] == 2
    assert counts["SimplifiedLayerNormalization"] == 2


def test_quantized_products_are_merged() -> None:
    rng = np.random.default_rng(0)
    rows, block, sizes = 64, 32, {"a": 40, "b": 24}
    values, nodes = {}, []
    attributes: dict[str, Any] = {"bits": 4, "block_size": block, "accuracy_level": 4}
    for name, size in sizes.items():
        values[name] = rng.integers(0, 256, (size, rows // block, block // 2), dtype=np.uint8)
        values[f"{name}.scales"] = rng.random((size, rows // block)).astype(np.float32)
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", name, f"{name}.scales"],
                [f"{name}.product"],
                domain="com.microsoft",
                K=rows,
                N=size,
                **attributes,
            )
        )
    nodes.append(helper.make_node("Concat", ["a.product", "b.product"], ["y"], axis=-1))
    nodes.append(helper.make_node("Identity", ["x"], ["stability"]))
    float_values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", width])
        for name, width in (("x", rows), ("y", rows), ("stability", 1))
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        float_values[:1],
        float_values[1:],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    versions = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    before = helper.make_model(graph, opset_imports=versions, ir_version=10)
    after = fused(before, {})
    assert operators(after)["MatMulNBits"] == 1
    feeds = {"x": rng.standard_normal((1, 3, rows)).astype(np.float32)}
    got, expected = (run(TracedGraph(model, {}), {}, feeds)[0] for model in (after, before))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_bundles_layers_are_merged(name: str, tiny_bundle: Callable[[str], TinyBundle]) -> None:
    """QKV, output, gate and up of a narrow MLP, and down; attention engines stop before the MLP."""
    _, bundle = tiny_bundle(name)
    for engine, products in (("layer", 4), ("attention", 2)):
        model = onnx.load(bundle / "onnx" / f"{engine}_000.onnx", load_external_data=False)
        counts = operators(model)
        assert (counts["FusedMatMul"], counts["MatMul"], counts["Transpose"]) == (products, 0, 0)


@pytest.mark.parametrize(
    ("name", "packed"), [("llama", True), ("qwen2", True), ("qwen3", False), ("phi3", False)]
)
def test_attention_takes_one_product_and_rotates_it(
    name: str, packed: bool, tiny_bundle: Callable[[str], TinyBundle]
) -> None:
    """Unless something happens to query and key on the way, or only a part of them is rotated."""
    _, bundle = tiny_bundle(name)
    model = onnx.load(bundle / "onnx" / "layer_000.onnx", load_external_data=False)
    counts = operators(model)
    assert (counts["RotaryEmbedding"] == 0) is packed
    attention = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    assert (list(attention.input[1:3]) == ["", ""]) is packed
    contexts = [v.name for v in model.graph.input if v.name.startswith("context_")]
    assert (contexts == []) is packed

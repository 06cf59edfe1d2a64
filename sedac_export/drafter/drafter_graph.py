"""A trained drafter's graphs for ONNX Runtime, their products in 8 bits."""

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from sedac_export.arrays import Floats
from sedac_export.drafter.draft_model import DrafterShape, DraftModel
from sedac_export.exits.training.exit_graphs import GraphBuilder
from sedac_export.exits.training.head_graph import quantized_product
from sedac_export.graph.trace import OPSET

_IR_VERSION = 10
# added to the scores of keys that a query does not see
_HIDDEN_SCORE = -1e9


def state_graph(drafter: DraftModel) -> onnx.ModelProto:
    """features [1, tokens, layers * hidden] -> state [1, tokens, hidden]."""
    shape = drafter.shape
    build = _DraftBuilder("draft_state_")
    hidden, taken = shape.hidden_size, len(shape.feature_layers)
    parts = build.split("features", [hidden] * taken)
    normed = [
        build.norm(part, norm) for part, norm in zip(parts, drafter.feature_norms, strict=True)
    ]
    joined = build.add("Concat", *normed, axis=-1) if taken > 1 else normed[0]
    build.product(joined, drafter.combine.weight, "state")
    return _model(
        build, "draft_state", [("features", taken * hidden)], [("state", "tokens", hidden)]
    )


def draft_graph(drafter: DraftModel, head: Floats) -> onnx.ModelProto:
    """One pass of the drafter's layer, after which only the newest token's logits are computed.

    state and embedding [1, tokens, hidden], position_ids [1, tokens], past_key and past_value
    [1, capacity, size], of which positions before the first of position_ids hold something ->
    new_key and new_value [1, tokens, size], next_state [1, 1, hidden], logits [1, 1, vocabulary].
    head: the draft vocabulary's rows of the model's head.
    """
    shape = drafter.shape
    build = _DraftBuilder("draft_")
    normed = (
        build.norm("state", drafter.state_norm),
        build.norm("embedding", drafter.embedding_norm),
    )
    joined = build.add("Concat", *normed, axis=-1)
    x = build.add("Add", "state", build.product(joined, drafter.join.weight))
    layer = drafter.layer
    x = build.add("Add", x, _attention(build, drafter, build.norm(x, layer.input_layernorm)))
    x = build.add("Add", x, _mlp(build, layer.mlp, build.norm(x, layer.post_attention_layernorm)))
    last = build.integers(-1)
    newest = build.add("Slice", x, last, build.integers(np.iinfo(np.int64).max), build.integers(1))
    build.add("Identity", newest, output="next_state")
    build.product(build.norm(newest, drafter.norm), torch.from_numpy(head), "logits")
    hidden, size = shape.hidden_size, shape.key_value_heads * shape.head_size
    model = _model(
        build,
        "draft",
        [("state", hidden), ("embedding", hidden)],
        [
            ("new_key", "tokens", size),
            ("new_value", "tokens", size),
            ("next_state", 1, hidden),
            ("logits", 1, len(head)),
        ],
    )
    ids = helper.make_tensor_value_info("position_ids", TensorProto.INT64, [1, "tokens"])
    past = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "capacity", size])
        for name in ("past_key", "past_value")
    ]
    model.graph.input.extend([ids, *past])
    return model


class _DraftBuilder(GraphBuilder):
    def norm(self, x: str, norm: Any) -> str:
        weight = self.constant(norm.weight)
        return self.add(
            "SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=norm.variance_epsilon
        )

    def product(self, x: str, weight: torch.Tensor, output: str = "") -> str:
        """`x` times the rows of `weight`, in 8 bits."""
        name = output or f"{self.prefix}product_{len(self.nodes)}"
        node, constants = quantized_product(x, weight.detach().numpy(), name)
        self.nodes.append(node)
        self.constants.extend(constants)
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def scalar(self, value: int) -> str:
        return self.constant(np.array(value, dtype=np.int64))


def _mlp(build: _DraftBuilder, mlp: Any, x: str) -> str:
    gate = build.product(x, mlp.gate_proj.weight)
    active = build.add("Mul", gate, build.add("Sigmoid", gate))
    both = build.add("Mul", active, build.product(x, mlp.up_proj.weight))
    return build.product(both, mlp.down_proj.weight)


def _attention(build: _DraftBuilder, drafter: DraftModel, x: str) -> str:
    shape, attention = drafter.shape, drafter.layer.self_attn
    groups, size = shape.key_value_heads, shape.head_size
    cos, sin = _rotary(build, drafter)
    query = _rotated(build, build.product(x, attention.q_proj.weight), shape.heads, size, cos, sin)
    key = _rotated(build, build.product(x, attention.k_proj.weight), groups, size, cos, sin)
    flat = build.integers(1, -1, groups * size)
    build.add("Reshape", key, flat, output="new_key")
    build.product(x, attention.v_proj.weight, "new_value")
    # queries that share a key are rows of one product: [groups, heads / groups * tokens, size]
    rows = build.add("Transpose", query, perm=[0, 2, 1, 3])
    rows = build.add("Reshape", rows, build.integers(groups, -1, size))
    keys, values = (_cached(build, name, shape) for name in ("key", "value"))
    scores = build.add("MatMul", rows, build.add("Transpose", keys, perm=[0, 2, 1]))
    scale = build.constant(np.array(size**-0.5, dtype=np.float32))
    mask = _mask(build)
    scaled = build.add("Mul", scores, scale)
    tokens = build.add("Shape", "position_ids", start=1, end=2)
    heads = build.integers(groups, shape.heads // groups)
    keys_shape = build.add("Shape", mask, start=0, end=2)
    whole = build.add("Concat", heads, keys_shape, axis=0)
    shares = build.add(
        "Softmax", build.add("Add", build.add("Reshape", scaled, whole), mask), axis=-1
    )
    keys_count = build.add("Shape", mask, start=1, end=2)
    shares = build.add(
        "Reshape", shares, build.add("Concat", build.integers(groups, -1), keys_count, axis=0)
    )
    mixed = build.add("MatMul", shares, values)
    split = build.add("Concat", build.integers(shape.heads), tokens, build.integers(size), axis=0)
    mixed = build.add("Transpose", build.add("Reshape", mixed, split), perm=[1, 0, 2])
    mixed = build.add("Reshape", mixed, build.integers(1, -1, shape.heads * size))
    return build.product(mixed, attention.o_proj.weight)


def _rotary(build: _DraftBuilder, drafter: DraftModel) -> tuple[str, str]:
    """Cosines and sines of the positions, [1, tokens, 1, head size]."""
    frequencies = drafter.rotary.inv_freq.detach().float().repeat(2)
    positions = build.add("Cast", "position_ids", to=TensorProto.FLOAT)
    positions = build.add("Unsqueeze", positions, build.integers(2, 3))
    angles = build.add("Mul", positions, build.constant(frequencies))
    return build.add("Cos", angles), build.add("Sin", angles)


def _rotated(build: _DraftBuilder, x: str, heads: int, size: int, cos: str, sin: str) -> str:
    """`x` [1, tokens, heads * size] rotated by its positions: [1, tokens, heads, size]."""
    x = build.add("Reshape", x, build.integers(1, -1, heads, size))
    first, second = build.split(x, [size // 2, size // 2])
    turned = build.add("Concat", build.add("Neg", second), first, axis=-1)
    return build.add("Add", build.add("Mul", x, cos), build.add("Mul", turned, sin))


def _cached(build: _DraftBuilder, kind: str, shape: DrafterShape) -> str:
    """All keys or values, [groups, capacity + tokens, size]."""
    all_of = build.add("Concat", f"past_{kind}", f"new_{kind}", axis=1)
    split = build.integers(-1, shape.key_value_heads, shape.head_size)
    return build.add("Transpose", build.add("Reshape", all_of, split), perm=[1, 0, 2])


def _mask(build: _DraftBuilder) -> str:
    """What is added to the scores [tokens, capacity + tokens]: queries see what precedes them."""
    zero, one = build.scalar(0), build.scalar(1)
    none = build.integers(0)
    capacity = build.add("Squeeze", build.add("Shape", "past_key", start=1, end=2), none)
    first = build.add("Squeeze", build.add("Gather", "position_ids", zero, axis=1), none)
    ids = build.add("Squeeze", "position_ids", none)
    past = build.add("Range", zero, capacity, one)
    # a place that holds nothing stands for a position behind all queries
    behind = build.constant(np.array(np.iinfo(np.int32).max, dtype=np.int64))
    held = build.add("Where", build.add("Less", past, first), past, behind)
    positions = build.add("Concat", held, ids, axis=0)
    queries = build.add("Unsqueeze", ids, build.integers(1))
    seen = build.add("LessOrEqual", positions, queries)
    visible = build.constant(np.array(0, dtype=np.float32))
    hidden = build.constant(np.array(_HIDDEN_SCORE, dtype=np.float32))
    return build.add("Where", seen, visible, hidden)


def _model(
    build: _DraftBuilder,
    name: str,
    inputs: list[tuple[str, int]],
    outputs: list[tuple[str, int | str, int]],
) -> onnx.ModelProto:
    taken = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", size])
        for name, size in inputs
    ]
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, tokens, size])
        for name, tokens, size in outputs
    ]
    graph = helper.make_graph(build.nodes, name, taken, given, build.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)

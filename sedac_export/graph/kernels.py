"""Ask ONNX Runtime whether its attention is right for a model's heads; no list covers them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from sedac_export.arrays import Array

_CACHE, _PROMPT = 8, 5
_SCALE, _WINDOW, _CAP = 0.5, 3, 2.0
_FLOAT, _INT = TensorProto.FLOAT, TensorProto.INT32
_INPUTS = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total")


@dataclass(frozen=True)
class Heads:
    """One layer's key-value heads and the numbers of each, and what else chooses a kernel.

    queries: the query heads; windowed, capped: whether there is a window and a soft cap.
    """

    count: int
    size: int
    queries: int
    windowed: bool
    capped: bool


def refusal(heads: Heads) -> str | None:
    """What is wrong with ONNX Runtime's GroupQueryAttention for `heads`, None if nothing."""
    try:
        got = _run(heads)
    except Exception as error:  # ONNX Runtime has a type for each kind of failure
        return " ".join(str(error).split("Status Message: ")[-1].split())
    expected = _expected(heads)
    difference = float(np.abs(got - expected).max())
    if not difference < 1e-4:
        return f"its results differ by {difference:.1e}"
    return None


def _tensors(heads: Heads) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    counts = {"query": heads.queries, "key": heads.count, "value": heads.count}
    return {
        name: rng.standard_normal((1, _PROMPT + 1, count * heads.size)).astype(np.float32)
        for name, count in counts.items()
    }


def _run(heads: Heads) -> Array:
    """A prompt, then one token more: outputs [1, tokens, heads * size]."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it refuses is reported by the exception
    session = onnxruntime.InferenceSession(
        _model(heads).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    tensors = _tensors(heads)
    cache = np.zeros((1, heads.count, _CACHE, heads.size), dtype=np.float32)
    past = {"past_key": cache, "past_value": cache}
    outputs = []
    for start, end in ((0, _PROMPT), (_PROMPT, _PROMPT + 1)):
        feeds = {name: tensor[:, start:end] for name, tensor in tensors.items()} | past
        feeds["seqlens_k"] = np.array([end - 1], dtype=np.int32)
        feeds["total"] = np.array(end, dtype=np.int32)
        output, key, value = session.run(None, feeds)
        past = {"past_key": key, "past_value": value}
        outputs.append(output)
    return np.concatenate(outputs, axis=1)


def _model(heads: Heads) -> Any:
    attributes: dict[str, Any] = {
        "num_heads": heads.queries,
        "kv_num_heads": heads.count,
        "scale": _SCALE,
    }
    if heads.windowed:
        attributes["local_window_size"] = _WINDOW
    if heads.capped:
        attributes["softcap"] = _CAP
    outputs = ("output", "present_key", "present_value")
    node = helper.make_node(
        "GroupQueryAttention", _INPUTS, outputs, domain="com.microsoft", **attributes
    )
    types = [_FLOAT] * 5 + [_INT, _INT]
    ranks = (3, 3, 3, 4, 4, 1, 0)
    values = [
        helper.make_tensor_value_info(name, kind, [None] * rank)
        for name, kind, rank in zip(_INPUTS, types, ranks, strict=True)
    ]
    results = [helper.make_tensor_value_info(name, _FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "attention", values, results)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


def _expected(heads: Heads) -> Array:
    """The same without a cache, in primitives."""
    tokens = _PROMPT + 1
    query, key, value = (
        torch.from_numpy(tensor).reshape(tokens, -1, heads.size).transpose(0, 1)
        for tensor in _tensors(heads).values()
    )
    key, value = (t.repeat_interleave(heads.queries // heads.count, 0) for t in (key, value))
    scores = query @ key.transpose(1, 2) * _SCALE
    if heads.capped:
        scores = torch.tanh(scores / _CAP) * _CAP
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if heads.windowed:
        seen = seen.triu(1 - _WINDOW)
    attended = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
    return attended.transpose(0, 1).reshape(1, tokens, -1).numpy()

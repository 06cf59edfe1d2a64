"""The head engine's graph in torch, so that gradients pass through it: what the lens trains on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor

from sedac_export.errors import SedacError
from sedac_export.exits.training.head_graph import HeadGraph

Attributes = dict[str, Any]
Operator = Callable[[Attributes, list[Tensor]], Tensor]


class TorchHead:
    """The head: hidden states [n, hidden] -> logits [n, vocabulary], fp32.

    Raises SedacError for a graph with an operator that is not among `OPERATORS`.
    """

    def __init__(self, head: HeadGraph, directory: Path) -> None:
        self.input, self.output = head.product.input[0], head.product.output[0]
        self.before, self.after = head.before(), head.after()
        for node in (*self.before, *self.after):
            if node.op_type not in OPERATORS:
                raise SedacError(
                    f"the head has the operator {node.op_type}, through which no lens can be"
                    " trained; use train-probes without --lens"
                )
        whole = np.arange(head.vocabulary)
        self.weight = torch.from_numpy(head.rows(whole))
        self.bias = None if head.bias is None else torch.from_numpy(head.bias[whole]).float()
        constants = head.constants([*self.before, *self.after], directory, whole)
        self.values = {c.name: _tensor(numpy_helper.to_array(c)) for c in constants}

    def __call__(self, x: Tensor) -> Tensor:
        """The logits."""
        values = self.values | {"x": x[None]}
        _run(self.before, values)
        values[self.output] = F.linear(values[self.input], self.weight, self.bias)
        _run(self.after, values)
        return values["logits"].reshape(len(x), -1)


def _run(nodes: list[onnx.NodeProto], values: dict[str, Tensor]) -> None:
    for node in nodes:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = [values[name] for name in node.input]
        values[node.output[0]] = OPERATORS[node.op_type](attributes, inputs)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.array(array))


def _constant(attributes: Attributes, _: list[Tensor]) -> Tensor:
    (value,) = attributes.values()
    is_tensor = isinstance(value, onnx.TensorProto)
    return _tensor(numpy_helper.to_array(value)) if is_tensor else torch.tensor(value)


def _cast(attributes: Attributes, inputs: list[Tensor]) -> Tensor:
    kind = helper.tensor_dtype_to_np_dtype(attributes["to"])
    return inputs[0].to(torch.from_numpy(np.zeros(0, dtype=kind)).dtype)


def _slice(_: Attributes, inputs: list[Tensor]) -> Tensor:
    data, starts, ends, axes, steps = inputs
    index = [slice(None)] * data.ndim
    for axis, *parts in zip(*(t.tolist() for t in (axes, starts, ends, steps)), strict=True):
        index[axis] = slice(*parts)
    return data[tuple(index)]


def _rms_norm(attributes: Attributes, inputs: list[Tensor]) -> Tensor:
    x, scale = inputs
    return F.rms_norm(x, x.shape[-1:], scale, attributes.get("epsilon", 1e-5))


def _layer_norm(attributes: Attributes, inputs: list[Tensor]) -> Tensor:
    x, scale, *shift = inputs
    bias = shift[0] if shift else None
    return F.layer_norm(x, x.shape[-1:], scale, bias, attributes.get("epsilon", 1e-5))


def _gemm(attributes: Attributes, inputs: list[Tensor]) -> Tensor:
    x, weight, *shift = inputs
    return F.linear(x, weight if attributes.get("transB") else weight.T, *shift)


# those of the heads that the exporter writes
OPERATORS: dict[str, Operator] = {
    "Constant": _constant,
    "Cast": _cast,
    "Slice": _slice,
    "Reshape": lambda _, i: i[0].reshape(i[1].tolist()),
    "RMSNormalization": _rms_norm,
    "LayerNormalization": _layer_norm,
    "Gemm": _gemm,
    "MatMul": lambda _, i: i[0] @ i[1],
    "Add": lambda _, i: i[0] + i[1],
    "Sub": lambda _, i: i[0] - i[1],
    "Mul": lambda _, i: i[0] * i[1],
    "Div": lambda _, i: i[0] / i[1],
    "Pow": lambda _, i: i[0] ** i[1],
    "Sqrt": lambda _, i: i[0].sqrt(),
    "Reciprocal": lambda _, i: i[0].reciprocal(),
    "ReduceMean": lambda a, i: i[0].mean(i[1].tolist(), keepdim=bool(a.get("keepdims", 1))),
    "Tanh": lambda _, i: i[0].tanh(),
}

"""TensorRT's place taken by PyTorch on a GPU: portable graphs, node by node, on the core's stream.

Knows the operators of Llama's graphs. Everything runs on the stream given and nothing waits for
it, so that the core can capture and replay the work as it does TensorRT's.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional

from sedac_runtime._core import PlanTensor
from sedac_runtime.flavour import Device, Target


class TorchExecutor:
    """An executor over a bundle's portable graphs. `calls` counts plans by replayed."""

    device: Device = "cuda"

    def __init__(self, bundle: Path, target: Target) -> None:
        self.target = target
        plans = json.loads((bundle / "bundle.json").read_text())["plans"][target]["plans"]
        # all weights now: what is allocated between captures may lie where a captured graph has
        # its intermediate tensors
        self.graphs = {bundle / plan["file"]: _Graph(bundle / plan["graph"]) for plan in plans}
        self.calls = {True: 0, False: 0}

    def __call__(self, plan: Path, tensors: list[PlanTensor], stream: int, replayed: bool) -> None:
        self.calls[replayed] += 1
        with torch.no_grad(), torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            self.graphs[plan].run({each.name: (each.address, each.shape) for each in tensors})


class _Memory:
    """Device memory that is not PyTorch's, in the protocol that PyTorch takes it by."""

    def __init__(self, address: int, shape: list[int], dtype: np.dtype[Any]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": tuple(shape),
            "typestr": dtype.str,
            "version": 3,
        }


class _Graph:
    def __init__(self, file: Path) -> None:
        self.graph = onnx.load(file).graph
        self.constants = {i.name: numpy_helper.to_array(i) for i in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _constant(node)
            elif node.op_type in ("Cast", "Reshape") and node.input[0] in self.constants:
                # bounds of slices: host numbers, whose shape and type do not matter
                self.constants[node.output[0]] = self.constants[node.input[0]].ravel()
        self.weights = {n: torch.from_numpy(c.copy()).cuda() for n, c in self.constants.items()}

    def run(self, given: dict[str, tuple[int, list[int]]]) -> None:
        values = {value.name: _view(value, *given[value.name]) for value in self.graph.input}
        for node in self.graph.node:
            if node.output[0] in self.constants:
                continue
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            inputs = [_Lazy(self, values, name) for name in node.input]
            values[node.output[0]] = getattr(_Operators, node.op_type)(*inputs, **attributes)
        for value in self.graph.output:
            output = _view(value, *given[value.name])
            if output.data_ptr() != values[value.name].data_ptr():
                output.copy_(values[value.name])


def _constant(node: onnx.NodeProto) -> Any:
    value = onnx.helper.get_attribute_value(node.attribute[0])
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.array(value, dtype=np.float32 if isinstance(value, float) else np.int64)


def _view(value: onnx.ValueInfoProto, address: int, shape: list[int]) -> Tensor:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return torch.as_tensor(_Memory(address, shape, dtype), device="cuda")


class _Lazy:
    """An input: its tensor on the device, or its numbers on the host if it is constant."""

    def __init__(self, graph: _Graph, values: dict[str, Tensor], name: str) -> None:
        self.graph, self.values, self.name = graph, values, name

    @property
    def tensor(self) -> Tensor:
        known = self.values.get(self.name)
        return self.graph.weights[self.name] if known is None else known

    @property
    def numbers(self) -> list[int]:
        return [int(number) for number in self.graph.constants[self.name].ravel()]


class _Operators:
    """ONNX's operators, as far as the graphs of a Llama use them."""

    Add = staticmethod(lambda a, b: a.tensor + b.tensor)
    Mul = staticmethod(lambda a, b: a.tensor * b.tensor)
    MatMul = staticmethod(lambda a, b: a.tensor @ b.tensor)
    Identity = staticmethod(lambda x: x.tensor)
    Cos = staticmethod(lambda x: x.tensor.cos())
    Sin = staticmethod(lambda x: x.tensor.sin())
    Sqrt = staticmethod(lambda x: x.tensor.sqrt())
    Sigmoid = staticmethod(lambda x: x.tensor.sigmoid())
    Reciprocal = staticmethod(lambda x: x.tensor.reciprocal())
    Gather = staticmethod(lambda x, i, axis=0: functional.embedding(i.tensor, x.tensor))
    Transpose = staticmethod(lambda x, perm: x.tensor.permute(perm))
    Concat = staticmethod(lambda *parts, axis: torch.cat([p.tensor for p in parts], axis))

    @staticmethod
    def Cast(x: _Lazy, to: int, **_: Any) -> Tensor:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(to)
        return x.tensor.to(torch.from_numpy(np.empty(0, dtype)).dtype)

    @staticmethod
    def Reshape(x: _Lazy, shape: _Lazy, allowzero: int = 0) -> Tensor:
        sizes = [x.tensor.shape[i] if n == 0 else n for i, n in enumerate(shape.numbers)]
        return x.tensor.reshape(sizes)

    @staticmethod
    def Unsqueeze(x: _Lazy, axes: _Lazy) -> Tensor:
        result = x.tensor
        for axis in axes.numbers:
            result = result.unsqueeze(axis)
        return result

    @staticmethod
    def Slice(x: _Lazy, start: _Lazy, end: _Lazy, axes: _Lazy, steps: _Lazy) -> Tensor:
        (axis,), (step,) = axes.numbers, steps.numbers
        where = [slice(None)] * x.tensor.dim()
        where[axis] = slice(start.numbers[0], end.numbers[0], step)
        return x.tensor[tuple(where)]

    @staticmethod
    def ReduceSum(x: _Lazy, axes: _Lazy, keepdims: int = 1, **_: Any) -> Tensor:
        return x.tensor.sum(axes.numbers, keepdim=bool(keepdims))

    @staticmethod
    def RMSNormalization(x: _Lazy, scale: _Lazy, epsilon: float, **_: Any) -> Tensor:
        wide = x.tensor.float()
        normed = wide * (wide.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
        return normed.to(scale.tensor.dtype) * scale.tensor

    @staticmethod
    def RotaryEmbedding(x: _Lazy, cos: _Lazy, sin: _Lazy, num_heads: int, **_: Any) -> Tensor:
        c, s = cos.tensor[:, :, None], sin.tensor[:, :, None]
        a, b = x.tensor.unflatten(-1, (num_heads, -1)).chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1).flatten(-2)

    @staticmethod
    def TensorScatter(past: _Lazy, update: _Lazy, index: _Lazy, axis: int = -2, **_: Any) -> Tensor:
        tokens = update.tensor.shape[axis]
        places = index.tensor + torch.arange(tokens, device="cuda")
        return past.tensor.index_copy_(past.tensor.dim() + axis, places, update.tensor)

    @staticmethod
    def Attention(query: _Lazy, key: _Lazy, value: _Lazy, mask: _Lazy, **settings: Any) -> Tensor:
        return functional.scaled_dot_product_attention(
            query.tensor,
            key.tensor,
            value.tensor,
            attn_mask=mask.tensor,
            scale=settings.get("scale"),
            enable_gqa=True,
        )

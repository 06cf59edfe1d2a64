"""The head engine's graph in two parts: what comes before its large product, and its rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from sedac_export.arrays import Floats
from sedac_export.bundle import Bundle
from sedac_export.errors import SedacError
from sedac_export.model.quantization import Quantization, QuantizedRows

BLOCK = 32
_PRODUCTS = ("Gemm", "MatMul")
_QUANTIZED_PRODUCT = "MatMulNBits"


class HeadRows(Protocol):
    """The product's weights [vocabulary, width], left on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and width."""

    def __getitem__(self, rows: Any) -> npt.NDArray[np.floating[Any]]:
        """Some rows."""


@dataclass(frozen=True)
class _QuantizedHeadRows:
    rows: QuantizedRows
    quantization: Quantization
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows.scales), self.width

    def __getitem__(self, rows: Any) -> Floats:
        zeros = self.rows.zero_points
        chosen = QuantizedRows(
            self.rows.values[rows], self.rows.scales[rows], None if zeros is None else zeros[rows]
        )
        return chosen.dequantized(self.quantization, self.width)


@dataclass(frozen=True)
class HeadGraph:
    """The head as nodes before, the product with the vocabulary's rows, and nodes after.

    The product takes `normed` [.., width] to `logits`; weight is [vocabulary, width] on disk.
    """

    model: onnx.ModelProto
    product: onnx.NodeProto
    weight: HeadRows
    bias: npt.NDArray[np.float32] | None
    vocabulary: int

    @classmethod
    def load(cls, bundle: Bundle) -> "HeadGraph":
        """Split the head of `bundle`.

        Raises SedacError when no product with the vocabulary's rows is found.
        """
        file = bundle.manifest.engines.head
        model, path = bundle.graph(file), bundle.path(file)
        vocabulary = bundle.manifest.model.vocab_size
        known = {initializer.name: initializer for initializer in model.graph.initializer}
        casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}
        for node in model.graph.node:
            if node.op_type == _QUANTIZED_PRODUCT:
                rows, bias = _quantized_rows(node, known, path.parent)
                return cls(model, node, rows, bias, vocabulary)
            source = (
                known.get(casts.get(node.input[1], node.input[1])) if _is_product(node) else None
            )
            if source is None or vocabulary not in source.dims:
                continue
            weight = _read(source, path.parent)
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            bias = known.get(node.input[2]) if len(node.input) > 2 else None
            return cls(
                model,
                node,
                weight if transposed else weight.T,
                None if bias is None else _read(bias, path.parent),
                vocabulary,
            )
        raise SedacError(f"{path} holds no product with {vocabulary} rows; build the bundle again")

    @property
    def width(self) -> int:
        """Numbers that the product takes."""
        return int(self.weight.shape[1])

    def rows(self, tokens: npt.NDArray[np.int64]) -> Floats:
        """The weights of `tokens`, fp32 [tokens, width]."""
        return np.asarray(self.weight[tokens], dtype=np.float32)

    def before(self) -> list[onnx.NodeProto]:
        """The nodes that lead to the product's input, in order."""
        return self._leading_to({self.product.input[0]})

    def after(self) -> list[onnx.NodeProto]:
        """The nodes that take the product to `logits`, in order, constants of their own first."""
        reached, nodes = {self.product.output[0]}, []
        for node in self.model.graph.node:
            if reached & set(node.input):
                reached |= set(node.output)
                nodes.append(node)
        taken = {name for node in nodes for name in node.input} - reached
        known = {node.output[0] for node in self.before()}
        own = [node for node in self._leading_to(taken) if node.output[0] not in known]
        return [*own, *nodes]

    def _leading_to(self, needed: set[str]) -> list[onnx.NodeProto]:
        nodes = []
        for node in reversed(self.model.graph.node):
            if needed & set(node.output):
                needed = needed | set(node.input)
                nodes.append(node)
        return nodes[::-1]

    def constants(
        self, nodes: list[onnx.NodeProto], directory: Path, tokens: npt.NDArray[np.int64]
    ) -> list[TensorProto]:
        """The initialisers of `nodes` with values inline, cut to `tokens` along the vocabulary."""
        used = {name for node in nodes for name in node.input}
        tensors = []
        for initializer in self.model.graph.initializer:
            if initializer.name in used:
                value = _cut(_read(initializer, directory), self.vocabulary, tokens)
                tensors.append(numpy_helper.from_array(value, initializer.name))
        return tensors


def quantized_product(
    x: str, rows: Floats, output: str
) -> tuple[onnx.NodeProto, list[TensorProto]]:
    """A node that multiplies `x` [.., width] by `rows` [n, width] in 8 bits: [.., n].

    Weights are rounded in blocks of BLOCK with one scale each, activations when it runs: a quarter
    of the bytes of fp32, and several times as fast. The node is ONNX Runtime's MatMulNBits.
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """
    count, width = rows.shape
    blocks = -(-width // BLOCK)
    padded = np.zeros((count, blocks, BLOCK), dtype=np.float32)
    padded.reshape(count, -1)[:, :width] = rows
    scales = np.maximum(np.abs(padded).max(-1), 1e-12) / 127
    whole = np.clip(np.rint(padded / scales[..., None]), -127, 127) + 128
    node = helper.make_node(
        "MatMulNBits",
        [x, f"{output}_rows", f"{output}_scales"],
        [output],
        domain="com.microsoft",
        K=width,
        N=count,
        bits=8,
        block_size=BLOCK,
        accuracy_level=4,
    )
    return node, [
        numpy_helper.from_array(whole.astype(np.uint8), f"{output}_rows"),
        numpy_helper.from_array(scales.reshape(-1), f"{output}_scales"),
    ]


def _quantized_rows(
    node: onnx.NodeProto, known: dict[str, TensorProto], directory: Path
) -> tuple[_QuantizedHeadRows, npt.NDArray[np.float32] | None]:
    """The weights of a product by MatMulNBits, and its bias."""
    attributes = {a.name: a.i for a in node.attribute}
    _, values, scales, zeros, _, bias = [
        _read(known[name], directory) if name in known else None
        for name in [*node.input, *[""] * (6 - len(node.input))]
    ]
    assert values is not None and scales is not None
    quantization = Quantization(attributes["bits"], attributes["block_size"], zeros is None)
    rows = QuantizedRows(values, scales.reshape(len(values), -1), zeros)
    return _QuantizedHeadRows(rows, quantization, attributes["K"]), bias


def _is_product(node: onnx.NodeProto) -> bool:
    return node.op_type in _PRODUCTS


def _cut(
    value: npt.NDArray[np.generic], vocabulary: int, tokens: npt.NDArray[np.int64]
) -> npt.NDArray[np.generic]:
    """`value` for fewer rows of the vocabulary: a vector cut, a shape that names it changed."""
    if value.dtype == np.int64 and value.ndim == 1:
        return np.where(value == vocabulary, len(tokens), value)
    if value.ndim and value.shape[-1] == vocabulary:
        return value[..., tokens]
    return value


def _read(initializer: TensorProto, directory: Path) -> npt.NDArray[np.float32]:
    """The initialiser's value; external data is mapped and, where stored in bf16, converted."""
    if initializer.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(initializer)
    place = {entry.key: entry.value for entry in initializer.external_data}
    bf16 = initializer.data_type == TensorProto.BFLOAT16
    kind = np.uint16 if bf16 else helper.tensor_dtype_to_np_dtype(initializer.data_type)
    mapped = np.memmap(
        directory / place["location"],
        dtype=kind,
        mode="r",
        offset=int(place["offset"]),
        shape=tuple(initializer.dims),
    )
    if not bf16:
        return mapped
    return (mapped.astype(np.uint32) << 16).view(np.float32)

"""Weights in blocks of 4 or 8 bits, by ONNX Runtime's quantizers, and what they stand for."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sedac_export.arrays import Array, Floats
from sedac_export.errors import SedacError

Method = Literal["rtn", "k_quant"]

BITS = {"int4": 4, "int8": 8}
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized: `block_size` neighbours of a row share a scale.

    Symmetric blocks have their zero in the middle of the range, others store a zero point.
    """

    bits: int
    block_size: int = 32
    symmetric: bool = True
    method: Method = "rtn"

    def check(self) -> None:
        """Raise SedacError for what no kernel or quantizer takes."""
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise SedacError(f"--block-size {self.block_size} is none of {sizes}")
        if self.symmetric and self.method == "k_quant":
            raise SedacError(
                "--method k_quant fits a zero point to each block; build with --asymmetric"
            )

    def blocks(self, columns: int) -> int:
        """Blocks of a row of `columns` weights; the last may be padded."""
        return -(-columns // self.block_size)

    def bytes_of(self, numbers: int) -> int:
        """Bytes that so many packed `numbers` take."""
        return -(-numbers * self.bits // 8)


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of a quantized weight, as MatMulNBits and GatherBlockQuantized read them.

    values: uint8 [rows, blocks, block_size * bits / 8], the lower bits first; scales: fp32 [rows,
    blocks]; zero_points: uint8 [rows, bytes of a row's], None where symmetric.
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """

    values: Array
    scales: Floats
    zero_points: Array | None

    def dequantized(self, quantization: Quantization, columns: int) -> Floats:
        """The weights that the kernels compute with, fp32 [rows, columns]."""
        bits, (rows, blocks) = quantization.bits, self.scales.shape
        numbers = _unpacked(self.values.reshape(rows, -1), bits).reshape(rows, blocks, -1)
        if self.zero_points is None:
            zeros: Floats = np.full((rows, blocks), 2 ** (bits - 1), dtype=np.float32)
        else:
            zeros = _unpacked(self.zero_points, bits)[:, :blocks]
        weights = (numbers - zeros[..., None]) * self.scales[..., None]
        return weights.reshape(rows, -1)[:, :columns]


def quantize(weight: Floats, quantization: Quantization) -> QuantizedRows:
    """Quantize `weight`, fp32 [rows, columns], row by row."""
    with _library():
        return _METHODS[quantization.method](weight, quantization)


def _round_to_nearest(weight: Floats, quantization: Quantization) -> QuantizedRows:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(
        bits=quantization.bits,
        block_size=quantization.block_size,
        is_symmetric=quantization.symmetric,
    )
    columns_first = np.ascontiguousarray(weight.T)
    values, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(columns_first)
    return QuantizedRows(values, scales, None if quantization.symmetric else zeros)


def _k_quant(weight: Floats, quantization: Quantization) -> QuantizedRows:
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    bits, size = quantization.bits, quantization.block_size
    rows, columns = weight.shape
    blocks = quantization.blocks(columns)
    padded = np.pad(weight, ((0, 0), (0, blocks * size - columns)))
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks whose weights are all the same
        numbers, scales, zeros = quant_tensor_k_quant_cpu(padded, bits, size)
    return QuantizedRows(
        _packed(numbers.astype(np.uint8).reshape(rows * blocks, size), bits).reshape(
            rows, blocks, -1
        ),
        scales.astype(np.float32).reshape(rows, blocks),
        _packed(zeros.reshape(rows, blocks), bits),
    )


_METHODS: dict[Method, Callable[[Floats, Quantization], QuantizedRows]] = {
    "rtn": _round_to_nearest,
    "k_quant": _k_quant,
}


def _unpacked(packed: Array, bits: int) -> Floats:
    """The numbers in `packed`, uint8 [rows, bytes], as fp32 [rows, numbers]."""
    if bits == 8:
        return packed.astype(np.float32)
    pairs = np.stack((packed & 0xF, packed >> 4), axis=-1)
    return pairs.reshape(len(packed), -1).astype(np.float32)


def _packed(numbers: Array, bits: int) -> Array:
    """`numbers`, uint8 [rows, numbers], in the bytes that `_unpacked` reads."""
    if bits == 8:
        return numbers
    even = np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2)))
    packed: Array = even[:, ::2] | even[:, 1::2] << 4
    return packed


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Within this the root logger stays as it is: importing the quantizers sets it up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)

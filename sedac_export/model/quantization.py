"""Weights in blocks of 4 or 8 bits, by ONNX Runtime's quantizers, and what they stand for."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from sedac_export.arrays import Array, Floats
from sedac_export.errors import SedacError

Method = Literal["rtn", "gptq"]

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
        numbers = unpacked(self.values.reshape(rows, -1), bits).reshape(rows, blocks, -1)
        weights = (numbers - self.zeros(quantization)[..., None]) * self.scales[..., None]
        return weights.reshape(rows, -1)[:, :columns]

    def zeros(self, quantization: Quantization) -> Floats:
        """The number that stands for zero in each block, fp32 [rows, blocks]."""
        if self.zero_points is None:
            return np.full(self.scales.shape, 2 ** (quantization.bits - 1), dtype=np.float32)
        return unpacked(self.zero_points, quantization.bits)[:, : self.scales.shape[1]]


def quantize(weight: Floats, quantization: Quantization) -> QuantizedRows:
    """Round `weight`, fp32 [rows, columns], to the nearest numbers of each block's range."""
    with _library():
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
    zero_points = None if quantization.symmetric else zeros
    return QuantizedRows(values, _rounded_to_fp16(scales), zero_points)


def _rounded_to_fp16(scales: Floats) -> Floats:
    """`scales` as numbers of fp16, where its normal numbers are as large.

    Kernels store them in 16 bits: on GPUs in any case, on CPUs where nothing is lost.
    """
    limits, sizes = np.finfo(np.float16), np.abs(scales)
    is_normal = (sizes >= limits.smallest_normal) & (sizes <= limits.max)
    rounded: Floats = np.where(is_normal, scales, 0).astype(np.float16).astype(np.float32)
    return np.where(is_normal, rounded, scales)


def quantize_calibrated(
    weight: Floats, squares: Floats, quantization: Quantization
) -> QuantizedRows:
    """Quantize `weight`, fp32 [rows, columns], by GPTQ (https://arxiv.org/abs/2210.17323).

    What a column's rounding changes in the outputs is made up for by the columns after it. squares:
    sum over a text of x x^T, fp32 [columns, columns], x being what the weight multiplies.

    ONNX Runtime's own gptq() reads the wrong half of a triangular matrix and rounds to nearest.
    """
    rest = torch.from_numpy(weight.copy())
    factor = _inverse_factor(squares)
    pieces = []
    for start in range(0, weight.shape[1], quantization.block_size):
        stop = min(start + quantization.block_size, weight.shape[1])
        block = rest[:, start:stop].clone()
        grid = quantize(block.numpy(), quantization)
        numbers, errors = _round_columns(block, grid, factor[start:stop, start:stop], quantization)
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
        pieces.append((numbers, grid))
    return _joined(pieces, quantization)


def _inverse_factor(squares: Floats) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of `squares`, damped by 1 % of its mean diagonal."""
    damped = torch.from_numpy(squares).double()
    diagonal = damped.diagonal()
    diagonal += 0.01 * diagonal.mean() + 1e-12
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _round_columns(
    block: torch.Tensor, grid: QuantizedRows, factor: torch.Tensor, quantization: Quantization
) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of one block, uint8 [rows, columns], and what its columns leave to those after.

    grid: the scale and zero point of each row.
    """
    scales = torch.from_numpy(grid.scales[:, 0])  # negative where the least weight is the largest
    scales = torch.where(scales == 0, 1.0, scales)
    zeros = torch.from_numpy(grid.zeros(quantization)[:, 0])
    numbers = torch.empty_like(block)
    errors = torch.empty_like(block)
    for column in range(block.shape[1]):
        wanted = block[:, column]
        rounded = (wanted / scales).round().add(zeros).clamp(0, 2**quantization.bits - 1)
        error = (wanted - (rounded - zeros) * scales) / factor[column, column]
        block[:, column:] -= error[:, None] * factor[column, column:]
        numbers[:, column], errors[:, column] = rounded, error
    return numbers.byte(), errors


def _joined(
    pieces: list[tuple[torch.Tensor, QuantizedRows]], quantization: Quantization
) -> QuantizedRows:
    """Rows of blocks of numbers, the last filled up with zeros, with each block's grid."""
    numbers = torch.cat([numbers for numbers, _ in pieces], dim=1).numpy()
    zeros = np.concatenate([grid.zeros(quantization) for _, grid in pieces], axis=1)
    padding = len(pieces) * quantization.block_size - numbers.shape[1]
    padded = np.pad(numbers, ((0, 0), (0, padding)))
    if padding:
        padded[:, -padding:] = zeros[:, -1:]
    values = _packed(padded, quantization.bits)
    return QuantizedRows(
        values.reshape(len(values), len(pieces), -1),
        np.concatenate([grid.scales for _, grid in pieces], axis=1),
        None if quantization.symmetric else _packed(zeros.astype(np.uint8), quantization.bits),
    )


def transposed(values: Array) -> Array:
    """Packed numbers of 4 bits, uint8 [rows, blocks, bytes], as packed rows of their columns."""
    numbers = np.stack((values & 0xF, values >> 4), axis=-1).reshape(len(values), -1)
    return _packed(numbers.T, bits=4)


def unpacked(packed: Array, bits: int) -> Floats:
    """The numbers in `packed`, uint8 [rows, bytes], as fp32 [rows, numbers]."""
    if bits == 8:
        return packed.astype(np.float32)
    pairs = np.stack((packed & 0xF, packed >> 4), axis=-1)
    return pairs.reshape(len(packed), -1).astype(np.float32)


def _packed(numbers: Array, bits: int) -> Array:
    """`numbers`, uint8 [rows, numbers], in the bytes that `unpacked` reads."""
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

"""How the kernel reads a matrix: in blocks of 16 rows and 32 columns, see kernels/blocks.cuh.

A matrix is given by its parts, as the bundle's graphs store them: the weights themselves under "",
or quantized ones with their scales and zero points under the suffixes of those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sedac_export.arrays import Array
from sedac_export.bundle.cuda_entry import ChainShape
from sedac_export.bundle.manifest import Manifest, QuantizedWeights
from sedac_export.errors import SedacError
from sedac_export.graph.quantized_graph import SCALES, ZERO_POINTS
from sedac_export.model.quantization import BITS, Quantization, QuantizedRows, unpacked

# tiles of 16 rows in halves of 8, columns in blocks of 32, of which a lane takes 8
TILE, HALF, BLOCK, LANE = 16, 8, 32, 8

# the order of a lane's eight numbers of 4 bits
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]

Parts = Mapping[str, Array]


class WeightBlocks(Protocol):
    """A format of matrices."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of a matrix's parts."""

    @property
    def dtype(self) -> str:
        """Of a packed matrix, F16 or U8."""

    @property
    def bits(self) -> int:
        """Of a weight."""

    @property
    def zero_points(self) -> bool:
        """Whether they are stored."""

    @property
    def block_bytes(self) -> int:
        """Of a packed block."""

    def shape(self, rows: int, columns: int) -> list[int]:
        """Of a packed matrix."""

    def pack(self, parts: Parts) -> Array:
        """A matrix [rows, columns], of whole blocks of columns; zeros for missing rows.

        Raises SedacError for what the format cannot hold.
        """

    def unpack(self, packed: Array, rows: int) -> Array:
        """The weights [rows, columns] that the kernel computes with."""

    def weights(self, parts: Parts) -> Array:
        """The same of a matrix that is not packed."""


class HalfBlocks:
    """Weights of fp16: [rows / 16, columns / 32, 2, 8, 32]."""

    suffixes: tuple[str, ...] = ("",)
    dtype, bits, zero_points = "F16", 16, False
    block_bytes = 2 * TILE * BLOCK

    def shape(self, rows: int, columns: int) -> list[int]:
        """As WeightBlocks has it."""
        return [-(-rows // TILE), columns // BLOCK, TILE // HALF, HALF, BLOCK]

    def pack(self, parts: Parts) -> Array:
        """As WeightBlocks has it."""
        return np.ascontiguousarray(_tiles(self.weights(parts), BLOCK))

    def unpack(self, packed: Array, rows: int) -> Array:
        """As WeightBlocks has it."""
        return _rows(packed, rows)

    def weights(self, parts: Parts) -> Array:
        """As WeightBlocks has it."""
        with np.errstate(over="ignore"):
            halves: Array = parts[""].astype(np.float16)
        if not np.isfinite(halves).all():
            raise SedacError(
                "it has weights beyond the range of fp16, which the cuda target stores; leave the"
                " target out"
            )
        return halves


@dataclass(frozen=True)
class QuantizedBlocks:
    """Weights of 8 or 4 bits: uint8 [rows / 16, columns / 32, block_bytes].

    Scales are rounded to fp16: by at most 2^-11 of themselves where they are 2^-14 and more.
    """

    quantization: Quantization
    dtype = "U8"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """As WeightBlocks has it."""
        return ("", SCALES, ZERO_POINTS) if self.zero_points else ("", SCALES)

    @property
    def bits(self) -> int:
        """As WeightBlocks has it."""
        return self.quantization.bits

    @property
    def zero_points(self) -> bool:
        """As WeightBlocks has it."""
        return not self.quantization.symmetric

    @property
    def block_bytes(self) -> int:
        """As WeightBlocks has it."""
        return TILE * (BLOCK * self.bits // 8 + 2 + self.zero_points)

    def shape(self, rows: int, columns: int) -> list[int]:
        """As WeightBlocks has it."""
        return [-(-rows // TILE), columns // BLOCK, self.block_bytes]

    def pack(self, parts: Parts) -> Array:
        """As WeightBlocks has it."""
        numbers, scales, zeros = self._of_rows(parts)
        fields = [self._lanes(numbers), _lines(scales)]
        if self.zero_points:
            fields.append(_lines(zeros))
        return np.concatenate(fields, -1)

    def unpack(self, packed: Array, rows: int) -> Array:
        """As WeightBlocks has it."""
        end = TILE * BLOCK * self.bits // 8
        fields = np.split(packed, [end, end + 2 * TILE], -1)
        scales = _rows_of_lines(fields[1], np.float16)
        middle = np.full_like(scales, 2 ** (self.bits - 1))
        zeros = _rows_of_lines(fields[2], np.uint8) if self.zero_points else middle
        return _dequantized(self._numbers(fields[0]), scales, zeros)[:rows]

    def weights(self, parts: Parts) -> Array:
        """As WeightBlocks has it."""
        return _dequantized(*self._of_rows(parts))

    def _of_rows(self, parts: Parts) -> tuple[Array, Array, Array]:
        """Numbers [rows, columns]; scales in fp16 and zeros, [rows, columns / 32]."""
        stored = QuantizedRows(parts[""], parts[SCALES], parts.get(ZERO_POINTS))
        numbers = unpacked(stored.values.reshape(len(stored.values), -1), self.bits)
        with np.errstate(over="ignore"):
            scales = stored.scales.astype(np.float16)
        if not np.isfinite(scales).all():
            raise SedacError(
                "it has scales beyond the range of fp16, in which the cuda target stores them;"
                " leave the target out"
            )
        zeros = stored.zeros(self.quantization).astype(np.uint8)
        each = self.quantization.block_size // BLOCK
        return numbers.astype(np.uint8), scales.repeat(each, -1), zeros.repeat(each, -1)

    def _lanes(self, numbers: Array) -> Array:
        """[tiles, blocks, bytes]: of each lane its row of the upper half, and of the lower."""
        tiles = _tiles(numbers, BLOCK)
        lanes = tiles.reshape(*tiles.shape[:4], BLOCK // LANE, LANE).transpose(0, 1, 3, 4, 2, 5)
        if self.bits == 4:
            ordered = lanes[..., NIBBLES]
            lanes = ordered[..., ::2] | ordered[..., 1::2] << 4
        return np.ascontiguousarray(lanes).reshape(*lanes.shape[:2], -1)

    def _numbers(self, lanes: Array) -> Array:
        """[rows, columns] again, rows in whole tiles."""
        split = lanes.reshape(*lanes.shape[:2], HALF, BLOCK // LANE, TILE // HALF, -1)
        if self.bits == 4:
            ordered = np.stack((split & 15, split >> 4), -1).reshape(*split.shape[:-1], LANE)
            split = np.empty_like(ordered)
            split[..., NIBBLES] = ordered
        tiles = split.transpose(0, 1, 4, 2, 3, 5).reshape(*lanes.shape[:2], TILE // HALF, HALF, -1)
        return _rows(tiles, len(lanes) * TILE)


def weight_blocks(manifest: Manifest, shape: ChainShape) -> WeightBlocks:
    """The format of a bundle's matrices. Raises SedacError for weights that it cannot hold."""
    quantized = manifest.quantization
    if quantized is None:
        return HalfBlocks()
    rows = (shape.hidden, shape.heads * shape.head_size, shape.intermediate)
    check_quantized(quantized, rows)
    size = quantized.block_size
    return QuantizedBlocks(Quantization(BITS[manifest.precision], size, quantized.symmetric))


def check_quantized(quantized: QuantizedWeights, rows: Sequence[int] = ()) -> None:
    """Raise SedacError for quantized weights, of `rows` columns, that the kernel cannot hold."""
    if quantized.kept_layers or quantized.kept_head:
        raise SedacError(
            "--target cuda takes weights that are all quantized alike; build without"
            " --keep-precision"
        )
    size = quantized.block_size
    if size % BLOCK or any(columns % size for columns in rows):
        raise SedacError(
            f"--target cuda takes quantized weights in blocks of {BLOCK}, or of multiples that"
            f" divide the model's rows, and these are of {size}; build with --block-size {BLOCK}"
        )


def _tiles(matrix: Array, block: int) -> Array:
    """A matrix [rows, columns] as [rows / 16, columns / block, 2, 8, block]."""
    rows, columns = matrix.shape
    padded = np.pad(matrix, ((0, -rows % TILE), (0, 0)))
    tiles = padded.reshape(-1, TILE // HALF, HALF, columns // block, block)
    return tiles.transpose(0, 3, 1, 2, 4)


def _rows(tiles: Array, rows: int) -> Array:
    """The matrix whose _tiles these are."""
    return tiles.transpose(0, 2, 3, 1, 4).reshape(-1, tiles.shape[1] * tiles.shape[-1])[:rows]


def _lines(numbers: Array) -> Array:
    """[rows, blocks] as the bytes of [tiles, blocks, 8, 2]: rows r and r + 8 side by side."""
    lines = _tiles(numbers, 1)[..., 0].swapaxes(-1, -2)
    return np.ascontiguousarray(lines).reshape(*lines.shape[:2], -1).view(np.uint8)


def _rows_of_lines(lines: Array, dtype: type) -> Array:
    """The numbers [rows, blocks] whose _lines these are, rows in whole tiles."""
    numbers: Array = np.ascontiguousarray(lines).view(dtype).reshape(*lines.shape[:2], HALF, -1)
    return _rows(numbers.swapaxes(-1, -2)[..., None], len(lines) * TILE)


def _dequantized(numbers: Array, scales: Array, zeros: Array) -> Array:
    """fp32 [rows, columns], from scales and zeros [rows, columns / 32]."""
    blocks = numbers.reshape(len(numbers), -1, BLOCK).astype(np.float32)
    centred = blocks - zeros[..., None].astype(np.float32)
    weights: Array = centred * scales[..., None].astype(np.float32)
    return weights.reshape(len(numbers), -1)

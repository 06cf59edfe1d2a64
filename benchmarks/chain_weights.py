"""Weights of fp16, or quantized, of a random decoder on the device: as matrices and packed."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sedac_export.cuda.weight_blocks import (
    BLOCK,
    HALF,
    LANE,
    NIBBLES,
    TILE,
    HalfBlocks,
    QuantizedBlocks,
    WeightBlocks,
)
from sedac_export.model.quantization import Quantization


class WeightFormat(Protocol):
    """What becomes of a matrix, fp16 [rows, columns]."""

    @property
    def blocks(self) -> WeightBlocks:
        """The format of bundles that it is."""

    def rounded(self, matrix: Tensor) -> Tensor:
        """The weights that the kernel computes with, fp32."""

    def pack(self, matrix: Tensor) -> Tensor:
        """As `blocks` packs it, on the device."""


class Halves:
    """Weights of fp16."""

    blocks = HalfBlocks()

    def rounded(self, matrix: Tensor) -> Tensor:
        """As WeightFormat has it."""
        return matrix.float()

    def pack(self, matrix: Tensor) -> Tensor:
        """As WeightFormat has it."""
        return _tiles(matrix, BLOCK).contiguous()


@dataclass(frozen=True)
class Quantized:
    """Each 32 weights of a row share a scale, and where that is asked for a zero point."""

    bits: int
    zero_points: bool = False

    @property
    def blocks(self) -> WeightBlocks:
        """As WeightFormat has it."""
        return QuantizedBlocks(Quantization(self.bits, BLOCK, not self.zero_points))

    def parts(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers uint8 [rows, columns]; scales fp16 and zeros uint8, [rows, columns / 32]."""
        groups = matrix.float().view(len(matrix), -1, BLOCK)
        last = 2**self.bits - 1
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        zeros = torch.full_like(low, (last + 1) // 2)
        if self.zero_points:
            scales = ((high - low) / last).half()
            zeros = (-low / scales.float()).round().clamp(0, last)
        else:
            scales = (torch.maximum(-low, high) / (last // 2)).half()
        numbers = (groups / scales.float()[..., None]).round() + zeros[..., None]
        return numbers.clamp(0, last).byte().view(matrix.shape), scales, zeros.byte()

    def rounded(self, matrix: Tensor) -> Tensor:
        """As WeightFormat has it."""
        numbers, scales, zeros = self.parts(matrix)
        groups = numbers.float().view(len(matrix), -1, BLOCK) - zeros.float()[..., None]
        return (groups * scales.float()[..., None]).view(matrix.shape)

    def pack(self, matrix: Tensor) -> Tensor:
        """As WeightFormat has it."""
        numbers, scales, zeros = self.parts(matrix)
        tiles = _tiles(numbers, BLOCK)
        lanes = tiles.view(*tiles.shape[:4], BLOCK // LANE, LANE).permute(0, 1, 3, 4, 2, 5)
        if self.bits == 4:
            ordered = lanes[..., NIBBLES]
            lanes = ordered[..., ::2] | ordered[..., 1::2] << 4
        fields = [lanes.flatten(2), _lines(scales)]
        if self.zero_points:
            fields.append(_lines(zeros))
        return torch.cat(fields, -1)


def _tiles(matrix: Tensor, block: int) -> Tensor:
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -rows % TILE))
    tiles = padded.reshape(-1, TILE // HALF, HALF, columns // block, block)
    return tiles.permute(0, 3, 1, 2, 4).contiguous()


def _lines(numbers: Tensor) -> Tensor:
    lines = _tiles(numbers, 1)[..., 0].transpose(-1, -2).contiguous()
    return lines.flatten(2).view(torch.uint8)


FORMATS: dict[str, WeightFormat] = {
    "fp16": Halves(),
    "int8": Quantized(8),
    "int4": Quantized(4),
    "int4-asymmetric": Quantized(4, zero_points=True),
}

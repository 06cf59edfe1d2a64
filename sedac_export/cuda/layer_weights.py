"""A layer's weights as the kernel takes them, put together from those of the model's modules."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MATRICES = ("qkv", "o", "gate_up", "down")

# how many rows of gate lie beside as many of up
GATED_ROWS = 8

# gives the weight of a name below the layer, such as mlp.down_proj.weight
WeightReader = Callable[[str], Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows start to stop of a linear module's matrix, and of its bias if it has one."""

    module: str
    start: int
    stop: int
    biased: bool

    def matrix(self, read: WeightReader) -> Tensor:
        """[rows, columns]."""
        return read(f"{self.module}.weight")[self.start : self.stop]

    def bias(self, read: WeightReader) -> Tensor:
        """[rows], zeros where the module has none."""
        if not self.biased:
            return torch.zeros(self.stop - self.start)
        return read(f"{self.module}.bias")[self.start : self.stop]


@dataclass(frozen=True)
class NormWeight:
    """The weight of an RMS norm's module, to which `offset` is added."""

    module: str
    offset: float

    def vector(self, read: WeightReader) -> Tensor:
        """[numbers], in float32 or what is stored with more digits."""
        weight = read(f"{self.module}.weight")
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset


@dataclass(frozen=True)
class LayerWeights:
    """Which of a layer's modules does what; a norm that it does not have is None."""

    query: Rows
    key: Rows
    value: Rows
    o: Rows
    gate: Rows
    up: Rows
    down: Rows
    norms: dict[str, NormWeight]

    def vectors(self) -> set[str]:
        """Names of the norms and biases that the layer has."""
        biases = {name for name, parts in self._products().items() if any(p.biased for p in parts)}
        return {*self.norms, *(f"{name}_bias" for name in biases)}

    def matrix(self, name: str, read: WeightReader) -> Tensor:
        """The matrix `name` of MATRICES, [rows, columns], rows in the kernel's order."""
        return _joined(name, [part.matrix(read) for part in self._products()[name]])

    def vector(self, name: str, read: WeightReader) -> Tensor:
        """The norm or bias `name`, a bias in the order of its matrix's rows."""
        if name in self.norms:
            return self.norms[name].vector(read)
        product = name.removesuffix("_bias")
        return _joined(product, [part.bias(read) for part in self._products()[product]])

    def _products(self) -> dict[str, list[Rows]]:
        return {
            "qkv": [self.query, self.key, self.value],
            "o": [self.o],
            "gate_up": [self.gate, self.up],
            "down": [self.down],
        }


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if name != "gate_up":
        return torch.cat(parts)
    gate, up = (part.reshape(-1, GATED_ROWS, *part.shape[1:]) for part in parts)
    return torch.stack((gate, up), 1).flatten(0, 2)

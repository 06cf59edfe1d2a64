"""What checks of the chain's kernel have in common."""

from dataclasses import dataclass

from torch import Tensor

# relative norm of the difference; fp16 activations give some 1.2e-3
TOLERANCE = 1e-2

TOKENS = (5, 17, 33, 99, 120, 7, 8, 150)


@dataclass(frozen=True)
class KernelCheck:
    """What a check found."""

    name: str
    passed: bool
    detail: str = ""


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of `wanted`."""
    return float((found - wanted).norm() / wanted.norm())

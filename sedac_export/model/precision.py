"""The precisions that weights are stored in."""

import torch

from sedac_export.errors import SedacError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def stored(tensor: torch.Tensor, precision: str, name: str) -> torch.Tensor:
    """`tensor` in the dtype of `precision`. Raises SedacError when a value overflows it."""
    result = tensor.to(DTYPES[precision])
    if not _is_finite(result):
        if not _is_finite(tensor):
            raise SedacError(f"weight {name} holds infinities or NaN; is the checkpoint damaged?")
        raise SedacError(
            f"weight {name} overflows {precision}; build with --precision bf16 or fp32"
        )
    return result


def loses_digits(rounded: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `rounded` is further from `weight` than bf16 would be, both of one dtype.

    In fp16 it is so where most of the weight is below 2^-14, from where on digits are lost.
    """
    return bool((rounded - weight).abs().sum() > 2**-8 * weight.abs().sum())


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is infinite or NaN, found from the extremes, without a copy."""
    if tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())

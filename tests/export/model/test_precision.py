"""Weights that a precision cannot hold are refused, and those that it holds badly are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

from sedac_export import BuildRequest, build_bundle
from sedac_export.bundle.manifest import Precision
from sedac_export.model.precision import DTYPES, loses_digits


@pytest.mark.parametrize(
    ("precision", "scale", "loses"),
    [
        ("fp32", 1e-30, False),
        ("bf16", 1e-30, False),
        ("fp16", 1e-3, False),
        ("fp16", 1e-6, True),
        ("fp16", 1e-30, True),
        ("fp16", 0.0, False),
    ],
)
def test_what_is_too_small_for_fp16_loses_digits(precision: str, scale: float, loses: bool) -> None:
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)) * scale
    assert loses_digits(weight.to(DTYPES[precision]).float(), weight) is loses


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_build_names_the_weights(precision: Precision, tmp_path: Path) -> None:
    """Both are compared with rounded weights: nothing else would tell."""
    save_tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] *= 1e-7
    save_file(weights, file, metadata={"format": "pt"})
    built = build_bundle(BuildRequest(str(tmp_path / "model"), tmp_path / "bundle", precision))
    if precision == "bf16":
        assert not built.notes
    else:
        (note,) = built.notes
        assert "as small as those of lm_head.weight, and" in note

"""What masks mean, and which heads ONNX Runtime's attention takes."""

import pytest
import torch
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from sedac_export.graph.kernels import Heads, refusal
from sedac_export.graph.masks import KnownMasks, MaskFunction

WINDOW = 50


@pytest.mark.parametrize(
    ("function", "positions", "window", "causal"),
    [
        (causal_mask_function, 4096, None, True),
        (causal_mask_function, 4096, WINDOW, False),
        (sliding_window_causal_mask_function(WINDOW), 4096, WINDOW, True),
        (sliding_window_causal_mask_function(WINDOW), 4096, WINDOW + 1, False),
        (sliding_window_causal_mask_function(WINDOW), 4096, None, False),
        (sliding_window_causal_mask_function(4000), 4001, None, False),
        (chunked_causal_mask_function(WINDOW, torch.zeros(1, dtype=torch.int64)), 51, None, False),
        # texts that end before it shows
        (chunked_causal_mask_function(WINDOW, torch.zeros(1, dtype=torch.int64)), 50, None, True),
    ],
)
def test_masks_are_compared_with_what_attention_is_told(
    function: MaskFunction, positions: int, window: int | None, causal: bool
) -> None:
    masks = KnownMasks(positions)
    mask = masks(batch_size=1, q_length=4, kv_length=4, mask_function=function, dtype=None)
    assert masks.is_causal(mask, window) == causal
    assert not masks.is_causal(mask.clone(), window)  # one that was made elsewhere


@pytest.mark.parametrize(("windowed", "capped"), [(False, False), (True, False), (True, True)])
def test_onnx_runtime_is_asked_which_heads_it_takes(windowed: bool, capped: bool) -> None:
    assert refusal(Heads(2, 64, 4, windowed, capped)) is None
    reason = refusal(Heads(2, 20, 4, windowed, capped))
    assert reason is not None
    assert "multiple of 8" in reason


def test_wrong_results_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from sedac_export.graph import kernels

    expected = kernels._expected
    monkeypatch.setattr(kernels, "_expected", lambda heads: expected(heads) + 0.01)
    assert "differ by 1.0e-02" in (refusal(Heads(2, 64, 4, False, False)) or "")

"""Attention engines are layers without their MLP, and soft exits in the chain are eager's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model

from sedac_export import BuildRequest, build_bundle
from sedac_export.arrays import Mask
from sedac_export.bundle import Bundle
from sedac_export.exits.replay.replay import Replay
from sedac_export.exits.replay.signals import Signals
from sedac_export.pytorch.accelerator import create_universal_accelerator


class SoftAt:
    """Every second token exits softly after `depth` layers, skipping half of what remains."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def begin(self, tokens: int) -> None:
        self.tokens = tokens

    def observe(self, signals: Signals) -> Mask:
        return (np.arange(self.tokens) % 2 == 0) & (signals.depth == self.depth)

    def soft_ratio(self) -> np.ndarray:
        return np.full(self.tokens, 0.5, dtype=np.float32)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
def test_soft_exits_equal_eager(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(name, tmp_path / "model")
    build_bundle(BuildRequest(model=str(tmp_path / "model"), output=tmp_path / "bundle"))
    replay = Replay(Bundle.open(tmp_path / "bundle"))
    tokens = np.arange(3, 43)
    trace = replay.run(tokens, SoftAt(2))
    with torch.no_grad(), create_universal_accelerator(model, policy=SoftAt(2)) as soft:
        logits = model(torch.from_numpy(tokens)[None]).logits[0]
    assert trace.depths.tolist() == soft.stats().last_depths
    assert set(trace.depths.tolist()) == {3, 4}
    assert trace.tokens.tolist() == logits.argmax(-1).tolist()
    # the share that was skipped shows
    assert trace.tokens.tolist() != replay.run(tokens).tokens.tolist()

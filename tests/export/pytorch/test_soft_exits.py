"""Attention engines are layers without their MLP, and soft exits in the chain are eager's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model

from sedac_export import BuildRequest, build_bundle
from sedac_export.bundle import Bundle
from sedac_export.exits.replay import pass_exits
from sedac_export.exits.replay.replay import Replay
from sedac_export.pytorch.accelerator import create_universal_accelerator
from sedac_runtime._core import PolicySettings


class SoftAtTwo:
    """In a decision's place: every second token exits softly after 2 layers, and skips the MLPs of
    half of what remains. Untrained bundles have no signal that would decide so."""

    def __init__(self, _: object, num_layers: int, __: object, full_depth: np.ndarray) -> None:
        count = len(full_depth)
        self.exit_layers, self.skip_from = np.full((2, count), num_layers)
        self.exited = np.zeros(count, dtype=bool)
        self.deciding = (np.arange(count) % 2 == 0) & ~full_depth
        self.half = num_layers - (num_layers - 2) // 2

    def reads_risk(self, _: int) -> bool:
        return False

    reads_exit_head = reads_risk

    def observe(self, depth: int, *_: object) -> None:
        if depth == 2:
            self.exit_layers[self.deciding] = depth
            self.skip_from[self.deciding] = self.half


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
def test_soft_exits_equal_eager(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(name, tmp_path / "model")
    build_bundle(BuildRequest(model=str(tmp_path / "model"), output=tmp_path / "bundle"))
    replay = Replay(Bundle.open(tmp_path / "bundle"))
    tokens = np.arange(3, 43)
    full = replay.run(tokens)
    monkeypatch.setattr(pass_exits, "BatchDecision", SoftAtTwo)
    trace = replay.run(tokens, PolicySettings("stability"))
    with torch.no_grad(), create_universal_accelerator(model) as soft:
        logits = model(torch.from_numpy(tokens)[None]).logits[0]
    assert trace.depths.tolist() == soft.stats().last_depths
    assert set(trace.depths.tolist()) == {3, 4}
    assert trace.tokens.tolist() == logits.argmax(-1).tolist()
    # the share that was skipped shows
    assert trace.tokens.tolist() != full.tokens.tolist()

"""A replay gives what the runtime gives token by token, and what eager transformers gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import THREADS
from eager import Stable, greedy
from transformers import PreTrainedModel

from sedac_export.bundle import Bundle
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.errors import SedacError
from sedac_export.exits.replay.replay import Replay, chunks, statistics
from sedac_runtime import SedacModel

PROMPT = "class Stack:\n    def push(self, item):\n"


@pytest.fixture(scope="module")
def replay(demo_bundle: Path) -> Replay:
    return Replay(Bundle.open(demo_bundle), THREADS)


def test_full_depth_predicts_what_the_runtime_generates(
    replay: Replay, demo_model: SedacModel
) -> None:
    prompt = demo_model.encode(PROMPT)
    output = demo_model.generate(prompt, mode="full", max_new_tokens=300, stop_tokens=[])
    trace = replay.run(np.array(prompt + output.tokens))
    assert trace.tokens[len(prompt) - 1 : -1].tolist() == output.tokens
    assert set(trace.depths) == {12}


@pytest.mark.parametrize(
    ("tau", "k"), [(0.99, 3), pytest.param(0.98, 2, marks=pytest.mark.slow), (0.95, 1)]
)
def test_exits_are_those_of_decoding_token_by_token(
    tau: float,
    k: int,
    replay: Replay,
    demo_model: SedacModel,
    demo_reference: PreTrainedModel,
) -> None:
    # the replay's chunks must not show: more tokens than one of them holds
    prompt = demo_model.encode(PROMPT)
    count = 300
    output = demo_model.generate(
        prompt, mode="exit", tau=tau, consecutive_k=k, max_new_tokens=count, stop_tokens=[]
    )
    tokens = np.array(prompt + output.tokens[:-1])
    policy = ExitConfig(tau=tau, consecutive_k=k, min_layer_ratio=0.2).policy_settings()
    trace = replay.run(tokens, policy, full_depth=len(prompt))
    assert trace.tokens[len(prompt) - 1 :].tolist() == output.tokens
    assert trace.exits[len(prompt) - 1 :].tolist() == output.exit_layers
    expected = greedy(demo_reference, prompt, count, Stable(tau, k, min_depth=3))
    assert trace.exits[len(prompt) - 1 :].tolist() == expected.exit_layers


def test_losses_are_those_of_transformers(
    replay: Replay, demo_model: SedacModel, demo_reference: PreTrainedModel
) -> None:
    tokens = demo_model.encode(PROMPT * 10)
    trace = replay.run(np.array(tokens))
    with torch.no_grad():
        loss = demo_reference(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
    assert np.isnan(trace.losses[-1])
    assert trace.losses[:-1].mean() == pytest.approx(float(loss), rel=1e-4)


def test_statistics_of_two_tokens() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]], dtype=np.float32))
    top, entropies, margins, losses = statistics(logits, np.array([1]))
    assert top.tolist() == [0, 2]
    assert margins == pytest.approx([0.5, 0.25])
    assert entropies[1] == pytest.approx(1.5 * np.log(2), rel=1e-6)
    assert losses[0] == pytest.approx(-np.log(0.2))
    assert np.isnan(losses[1])


def test_chunks_cover_every_position_once() -> None:
    covered = np.concatenate([np.arange(c.start, c.stop) for c in chunks(1000, 256)])
    assert covered.tolist() == list(range(1000))


def test_activations_that_are_not_numbers_are_refused(
    replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = replay.runner.load(replay.manifest.engines.layers[3].file)
    run = layer.run

    def damaged(*args: object) -> dict[str, np.ndarray]:
        outputs = run(*args)  # type: ignore[arg-type]
        outputs["y"][0, 5] = np.nan
        return outputs

    monkeypatch.setattr(layer, "run", damaged)
    with pytest.raises(SedacError, match="activations are NaN"):
        replay.run(np.arange(20))

"""Every run starts afresh, and settings take turns."""

from types import SimpleNamespace
from typing import Any

import pytest

from sedac_export.advice import time_modes as timing
from sedac_export.advice.time_modes import time_modes
from sedac_runtime import SedacModel
from sedac_runtime._core import DecodingMode, DecodingSetting


class _Recorder:
    """Stands in for the core's model."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def forget_texts(self) -> None:
        self.calls.append("forgotten")

    def generate(self, prompt: list[int], setting: str, *_: object, **__: object) -> Any:
        self.calls.append((prompt[0], setting))
        tokens = [SimpleNamespace(id=n, exit_layer=n) for n in (1, 2, 4)]
        summary = SimpleNamespace(tokens=tokens, decode_ms=2.0 * len(self.calls))
        return SimpleNamespace(finish=lambda: None, summary=lambda: summary)


def test_each_run_forgets_what_came_before_and_the_first_is_a_warm_up() -> None:
    core = _Recorder()
    model: Any = SimpleNamespace(core=core)
    settings: Any = {"a": "A", "b": "B"}
    timed = time_modes(model, settings, [[7], [8], [9]])
    assert core.calls[::2] == ["forgotten"] * (len(core.calls) // 2)
    runs = core.calls[1::2]
    assert [prompt for prompt, _ in runs[::2]] == [7] + [7, 8, 9] * timing.ROUNDS
    turns = list(zip(runs[::2], runs[1::2], strict=True))
    assert all(first[0] == second[0] for first, second in turns)
    assert {first[1] for first, _ in turns} == {"A", "B"}
    for name in settings:
        assert timed[name].milliseconds.shape == (3, timing.ROUNDS)
        assert timed[name].mean_exit_layer == 3
        assert timed[name].texts[0] == ([7], [1, 2, 4])
    # the time of the two tokens after the first
    last = max(timed["a"].milliseconds[-1, -1], timed["b"].milliseconds[-1, -1])
    assert last == len(core.calls)


def test_lossless_runs_generate_full_depths_tokens(
    demo_model: SedacModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "NEW_TOKENS", 12)
    settings = {
        "full": DecodingSetting(DecodingMode.full()),
        "lookup": DecodingSetting(DecodingMode.lossless("prompt-lookup")),
    }
    prompts = [demo_model.encode(text) for text in ("def push(self, item):\n", "class Stack:\n")]
    timed = time_modes(demo_model, settings, prompts)
    assert timed["full"].texts == timed["lookup"].texts
    assert {len(tokens) for _, tokens in timed["full"].texts} == {12}
    assert timed["full"].mean_exit_layer == demo_model.num_layers

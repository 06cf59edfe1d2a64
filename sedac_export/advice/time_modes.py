"""Time ways to decode the same prompts, in turns."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sedac_export.arrays import Floats
from sedac_export.console import CountProgress
from sedac_export.errors import SedacError
from sedac_runtime import SedacError as RuntimeRefusal
from sedac_runtime import SedacModel
from sedac_runtime._core import DecodingSetting, Sampling

NEW_TOKENS = 128
ROUNDS = 3

# a prompt, and the tokens that were generated after it
Continuation = tuple[list[int], list[int]]


@dataclass(frozen=True)
class TimedMode:
    """milliseconds: of a decoded token, [prompts, rounds]. mean_exit_layer: layers run for one."""

    milliseconds: Floats
    mean_exit_layer: float
    texts: list[Continuation]


@dataclass(frozen=True)
class _Run:
    milliseconds: float
    layers: float
    tokens: list[int]


def time_modes(
    model: SedacModel,
    settings: Mapping[str, DecodingSetting],
    prompts: Sequence[list[int]],
    progress: CountProgress = lambda *_: None,
) -> dict[str, TimedMode]:
    """Generate greedily after each prompt under each setting, by name, in ROUNDS rounds.

    Settings take turns on each prompt in random order. The first prompt is run once more before, to
    warm up. Every run drafts as a new process would: texts that were generated before, above all
    that of the same prompt, are forgotten.

    Raises SedacError when the runtime refuses a setting.
    """
    order = random.Random(0)
    runs: dict[str, list[list[_Run]]] = {name: [[] for _ in prompts] for name in settings}
    turns = [0, *(index for _ in range(ROUNDS) for index in range(len(prompts)))]
    try:
        for turn, index in enumerate(turns):
            progress(turn, len(turns))
            for name in order.sample(list(settings), len(settings)):
                run = _generate(model, prompts[index], settings[name])
                if turn > 0:
                    runs[name][index].append(run)
    except RuntimeRefusal as error:
        raise SedacError(f"the runtime cannot be timed: {error}") from error
    progress(len(turns), len(turns))
    return {name: _summarise(prompts, timed) for name, timed in runs.items()}


def _generate(model: SedacModel, prompt: list[int], setting: DecodingSetting) -> _Run:
    model.core.forget_texts()
    generation = model.core.generate(
        prompt, setting, Sampling(), max_new_tokens=NEW_TOKENS, stop_tokens=[]
    )
    generation.finish()
    summary = generation.summary()
    decoded = summary.tokens[1:]
    return _Run(
        summary.decode_ms / len(decoded),
        float(np.mean([token.exit_layer for token in decoded])),
        [token.id for token in summary.tokens],
    )


def _summarise(prompts: Sequence[list[int]], runs: Sequence[Sequence[_Run]]) -> TimedMode:
    return TimedMode(
        np.array([[run.milliseconds for run in rounds] for rounds in runs]),
        float(np.mean([run.layers for rounds in runs for run in rounds])),
        [
            (prompt, run.tokens)
            for prompt, rounds in zip(prompts, runs, strict=True)
            for run in rounds
        ],
    )

"""Time how a bundle generates: with exits, without and with drafters, and in lossless mode."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sedac_export.bundle.edit import edited_bundle, write_config
from sedac_export.bundle.exit_config import ExitConfig, MeasuredGeneration
from sedac_export.bundle.sessions import THREADS
from sedac_export.console import CountProgress
from sedac_export.errors import SedacError
from sedac_export.exits.replay.documents import Document
from sedac_export.exits.replay.replay import Replay
from sedac_runtime.choices import Drafter, LosslessDrafter, Mode

PROMPTS = 16
PROMPT_TOKENS = 128
NEW_TOKENS = 128

# mode and drafter of a generation
DecodingSetup = tuple[Mode, Drafter]
FULL: DecodingSetup = ("full", "none")
PLAIN: DecodingSetup = ("exit", "none")


@dataclass
class TimedRuns:
    """Decoding time after all prompts, in ms, and each prompt with the tokens that followed."""

    milliseconds: float = 0.0
    texts: list[tuple[list[int], list[int]]] = field(default_factory=list)


def measure_generation(
    replay: Replay,
    config: ExitConfig,
    documents: Sequence[Document],
    progress: CountProgress = lambda *_: None,
) -> tuple[LosslessDrafter | None, MeasuredGeneration]:
    """Generate under `config` after prompts cut from `documents`: its fastest drafter, and speeds.

    Raises SedacError when the runtime refuses the bundle.
    """
    prompts = cut_prompts(documents, replay.manifest.max_cache_length, PROMPTS)
    with edited_bundle(replay.bundle, keep=False) as copy:
        write_config(copy, config.to_json())
        runs = time_setups(copy, decoding_setups(config), prompts, progress)
    speeds = {setup: runs[FULL].milliseconds / run.milliseconds for setup, run in runs.items()}
    fastest: DecodingSetup = max(
        (setup for setup in speeds if setup[0] == "exit"), key=lambda setup: speeds[setup]
    )
    drafter: Any = None if fastest == PLAIN else fastest[1]
    texts = runs[fastest].texts
    return drafter, MeasuredGeneration(
        speedup=speeds[fastest],
        speedup_without_drafter=speeds[PLAIN],
        lossless_speedup=max(speed for setup, speed in speeds.items() if setup[0] == "lossless"),
        agreement=agreement(replay, texts),
        tokens=sum(len(tokens) for _, tokens in texts),
    )


def time_setups(
    directory: Path,
    setups: Sequence[DecodingSetup],
    prompts: Sequence[list[int]],
    progress: CountProgress = lambda *_: None,
) -> dict[DecodingSetup, TimedRuns]:
    """Generate after each prompt under each setup, greedily, setups taking turns in random order.

    The first prompt is run once more before, to warm up. Raises SedacError when the runtime refuses
    the bundle.
    """
    # only what measures needs the runtime and the engines that come with it
    from sedac_runtime import SedacError as RuntimeRefusal
    from sedac_runtime import SedacModel

    runs = {setup: TimedRuns() for setup in setups}
    order = random.Random(0)
    try:
        model = SedacModel.from_pretrained(directory, threads=THREADS)
        for number, prompt in enumerate([prompts[0], *prompts]):
            for setup in order.sample(setups, len(setups)):
                mode, drafter = setup
                settings: dict[str, Any] = {"mode": mode, "drafter": drafter, "stop_tokens": []}
                # neither the warm-up's text nor a similar one is drafted from
                model.core.forget_texts()
                output = model.generate(prompt, max_new_tokens=NEW_TOKENS, **settings)
                if number > 0:
                    runs[setup].milliseconds += output.decode_ms
                    runs[setup].texts.append((prompt, output.tokens))
            progress(number, len(prompts))
    except RuntimeRefusal as error:
        raise SedacError(f"the runtime cannot be timed: {error}") from error
    return runs


def agreement(replay: Replay, texts: Sequence[tuple[list[int], list[int]]]) -> float:
    """Share of the tokens that full depth would choose after what precedes them.

    texts: pairs of a prompt and the tokens that followed.
    """
    same = total = 0
    for prompt, tokens in texts:
        # the last token may not fit into a full cache, and nothing follows it
        text = np.array(prompt + tokens[:-1], dtype=np.int64)
        expected = replay.run(text).tokens[len(prompt) - 1 :]
        same += int((expected == np.array(tokens)).sum())
        total += len(tokens)
    return same / total


def cut_prompts(documents: Sequence[Document], cache_length: int, count: int) -> list[list[int]]:
    """`count` prompts, spread over the longest documents and within them."""
    longest = sorted(documents, key=lambda document: -len(document.tokens))[:count]
    rounds = -(-count // len(longest))
    length = min(PROMPT_TOKENS, cache_length // 2)
    prompts = []
    for turn, document in product(range(rounds), longest):
        start = (turn + 1) * len(document.tokens) // (rounds + 1)
        prompts.append(document.tokens[start : start + length].tolist())
    return prompts[:count]


def decoding_setups(config: ExitConfig) -> list[DecodingSetup]:
    """Full depth, lossless, and the exits of `config`, with drafters too if they can have some."""
    # a trained one drafts in lossless mode only, where auto weighs it
    drafters = [name for name in get_args(LosslessDrafter) if name != "trained"]
    lossless: list[DecodingSetup] = [("lossless", drafter) for drafter in drafters]
    drafts = config.kv_fill == "defer" and config.exit_kind != "soft"
    return [FULL, PLAIN, *lossless, *(("exit", d) for d in drafters if drafts)]

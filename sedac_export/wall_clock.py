"""Time a bundle in the runtime, under the exit configuration it has."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from sedac_export.documents import Document
from sedac_export.errors import SedacError
from sedac_export.sessions import THREADS

PROMPT_TOKENS = 64
NEW_TOKENS = 128
PROMPTS = 8


def measure_speedup(directory: Path, documents: Sequence[Document]) -> float:
    """Decoding time at full depth over decoding time with exits, medians over prompts.

    Prompts are cut from the middle of `documents`. Both ways take turns on each, after a warm-up,
    and generate the same number of tokens greedily.

    Raises SedacError when the runtime refuses the bundle.
    """
    # the runtime prepares nothing at import; only what measures needs it
    from sedac_runtime import SedacError as RuntimeRefusal
    from sedac_runtime import SedacModel

    prompts = _prompts(documents)
    try:
        model = SedacModel.from_pretrained(directory, threads=THREADS)
        times: dict[str, list[float]] = {"full": [], "exit": []}
        for prompt in [prompts[0], *prompts]:  # the first once more: its first time warms up
            for mode, taken in times.items():
                started = time.perf_counter()
                output = model.generate(
                    prompt, mode=mode, max_new_tokens=NEW_TOKENS, stop_tokens=[]
                )
                elapsed = time.perf_counter() - started - output.prefill_ms / 1e3
                taken.append(elapsed / len(output.tokens))
    except RuntimeRefusal as error:
        raise SedacError(f"the runtime cannot be timed: {error}") from error
    return statistics.median(times["full"][1:]) / statistics.median(times["exit"][1:])


def _prompts(documents: Sequence[Document]) -> list[list[int]]:
    longest = sorted(documents, key=lambda document: -len(document.tokens))[:PROMPTS]
    prompts = []
    for document in longest:
        start = max(0, len(document.tokens) - PROMPT_TOKENS) // 2
        prompts.append(document.tokens[start : start + PROMPT_TOKENS].tolist())
    return prompts

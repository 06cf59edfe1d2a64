"""Measure a bundle: wall-clock time per token of the chain, of forced exits, of one big engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sedac_runtime import _core
from sedac_runtime.library import default_threads, find_onnxruntime
from sedac_runtime.ranges import MOST_THREADS, check_count


def bench(
    bundle: str | Path,
    *,
    forced_exit: Sequence[int] = (),
    monolith: bool = False,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    repeat: int = 5,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of name, ms_per_token (median), tokens_per_second, min_ms, max_ms, mean_exit_layer.

    Each row decodes `new_tokens` greedily after the same prompt; rows take turns, `repeat` times
    after a warm-up. "chain" is full depth, "exit@d" exits every token at the first exit from d
    layers on and includes filling the skipped layers' caches, "monolith" runs all layers in one
    engine.

    Raises InputError when a number is out of range.
    """
    count = default_threads() if threads is None else threads
    check_count("threads", count, 1, MOST_THREADS)
    check_count("prompt_tokens", prompt_tokens, 1)
    check_count("new_tokens", new_tokens, 2)
    check_count("repeat", repeat, 1)
    for depth in forced_exit:
        check_count("forced_exit", depth, 1)
    cases: list[tuple[str, bool, int | None]] = [("chain", False, None)]
    cases += [(f"exit@{depth}", False, depth) for depth in forced_exit]
    if monolith:
        cases.append(("monolith", True, None))
    # any tokens will do; these differ, and exist in any vocabulary of 98 or more
    prompt = [1 + position % 97 for position in range(prompt_tokens)]
    return _core.bench(Path(bundle), find_onnxruntime(), count, cases, prompt, new_tokens, repeat)

"""Measure a bundle: wall-clock time per token of the chain, of forced exits, of one big engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from sedac_runtime import _core
from sedac_runtime.model import Backend, Drafter, SedacModel, Verify
from sedac_runtime.ranges import check_count

Reference = Literal["full", "monolith"]


def bench(
    bundle: str | Path,
    *,
    forced_exit: Sequence[int] = (),
    drafters: Sequence[Drafter] = (),
    against: Reference = "full",
    prompt: str | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    repeat: int = 5,
    threads: int | None = None,
    backend: Backend = "onnxruntime",
    verify: Verify = "always",
    memory_limit: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of name, ms_per_token (median), tokens_per_second, min_ms, max_ms, mean_exit_layer,
    speedup and agreement.

    Each row decodes `new_tokens` greedily after the same prompt; rows take turns, `repeat` times
    after a warm-up. "chain" is full depth, "exit@d" exits every token at the first exit from d
    layers on and includes filling the skipped layers' caches, "lossless:d" is full depth with
    drafts by drafter d. `against` "monolith" adds a row of that name, which runs all layers in one
    engine. speedup (the median of the turns' ratios) and agreement (the share of equal tokens) are
    relative to the chain, or to the monolith if asked for. The prompt is the first `prompt_tokens`
    tokens of the text `prompt`; without one it is no text at all, which tells nothing about drafts
    or exits.

    Raises InputError when a setting is out of range.
    """
    check_count("prompt_tokens", prompt_tokens, 1)
    check_count("new_tokens", new_tokens, 2)
    check_count("repeat", repeat, 1)
    if against not in get_args(Reference):
        raise _core.InputError(f"against {against} is out of range: full or monolith")
    for depth in forced_exit:
        check_count("forced_exit", depth, 1)
    cases: list[tuple[str, bool, int | None, str | None]] = [("chain", False, None, None)]
    cases += [(f"exit@{depth}", False, depth, None) for depth in forced_exit]
    cases += [(f"lossless:{drafter}", False, None, drafter) for drafter in drafters]
    if against == "monolith":
        cases.append(("monolith", True, None, None))
    start: list[int] | tuple[str, int] = (
        # any tokens will do; these differ, and exist in any vocabulary of 98 or more
        [1 + position % 97 for position in range(prompt_tokens)]
        if prompt is None
        else (prompt, prompt_tokens)
    )
    reference = len(cases) - 1 if against == "monolith" else 0
    model = SedacModel.from_pretrained(
        bundle, threads=threads, backend=backend, verify=verify, memory_limit=memory_limit
    )
    return model.measure(cases, start, new_tokens, repeat, reference)

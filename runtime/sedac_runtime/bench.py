"""Measure wall-clock time per token: the chain, forced exits, lossless mode, a single engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from sedac_runtime._core import BenchCase, DecodingMode, InputError
from sedac_runtime.bench_row import BenchRow
from sedac_runtime.choices import BackendChoice, DeviceChoice, LosslessDrafter, Verify
from sedac_runtime.model import SedacModel
from sedac_runtime.ranges import check_count

Reference = Literal["full", "monolith"]


def bench(
    bundle: str | Path,
    *,
    forced_exit: Sequence[int] = (),
    drafters: Sequence[LosslessDrafter] = (),
    against: Reference = "full",
    prompt: str | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    repeat: int = 5,
    threads: int | None = None,
    backend: BackendChoice = "onnxruntime",
    device: DeviceChoice | None = None,
    verify: Verify = "always",
    memory_limit: int | None = None,
) -> list[BenchRow]:
    """Measure time per token; returns a row for each variant.

    Each row decodes `new_tokens` greedily after the same prompt; the variants are interleaved,
    `repeat` times after a warm-up. "chain" is full depth; "exit@d" exits every token at the first
    exit layer from d on, KV backfill included; "lossless:d" is lossless mode with drafter d.
    against "monolith" adds a row of that name, a single engine of all layers.

    ms_per_token is a median. speedup (the median of the ratios within a repetition) and agreement
    (the share of equal tokens) are relative to the chain, or to the monolith if asked for. The
    prompt is the first `prompt_tokens` tokens of the text `prompt`; without one it is arbitrary
    tokens, which say nothing about drafts or exits.

    Raises InputError when a setting is out of range.
    """
    check_count("prompt_tokens", prompt_tokens, 1)
    check_count("new_tokens", new_tokens, 2)
    check_count("repeat", repeat, 1)
    if against not in get_args(Reference):
        raise InputError(f"against {against} is out of range: full or monolith")
    for depth in forced_exit:
        check_count("forced_exit", depth, 1)
    full = DecodingMode.full()
    cases = [BenchCase("chain", full)]
    cases += [BenchCase(f"exit@{depth}", DecodingMode.forced([depth])) for depth in forced_exit]
    cases += [BenchCase(f"lossless:{name}", DecodingMode.lossless(name)) for name in drafters]
    if against == "monolith":
        cases.append(BenchCase("monolith", full, monolith=True))
    # any tokens will do; these differ, and exist in any vocabulary of 98 or more
    meaningless = [1 + position % 97 for position in range(prompt_tokens)]
    model = SedacModel.from_pretrained(
        bundle,
        threads=threads,
        backend=backend,
        device=device,
        verify=verify,
        memory_limit=memory_limit,
    )
    return model.measure(
        cases,
        meaningless if prompt is None else prompt,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeat=repeat,
        against=len(cases) - 1 if against == "monolith" else 0,
    )

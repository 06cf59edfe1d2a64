"""What a token takes in each mode of a bundle on the GPU, and whether its tokens are full depth's.

64 prompts of 240 characters from modules of the standard library, or 40 chat prompts, 128 tokens
after each, one after another. A figure is the time of all generations, prompts and Python
included, over their tokens. Agreement is the share of exit mode's tokens that full depth would have
chosen after the same text. --cpu asks how many texts are those of the same bundle on the CPU.

    python benchmarks/models_on_gpu.py --engines BUNDLE [--prompts chat] [--cpu] [--json]
"""

import argparse
import asyncio.tasks
import inspect
import json
import json.decoder
import json.encoder
import operator
import time
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from first_prompt import chat_prompts

from sedac_runtime import GenerationOutput, SedacModel

MODULES = (json, typing, argparse, asyncio.tasks, json.decoder, json.encoder)
PROMPTS, CHAT_PROMPTS, LENGTH, NEW_TOKENS = 64, 40, 240, 128
SAMPLED = {"temperature": 0.7, "seed": 3}
MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "lossless, auto": {"mode": "lossless"},
    "lossless, prompt-lookup": {"mode": "lossless", "drafter": "prompt-lookup"},
    "lossless, early-exit": {"mode": "lossless", "drafter": "early-exit"},
    "lossless, trained": {"mode": "lossless", "drafter": "trained"},
    "exit": {"mode": "exit", "drafter": "none"},
    "full, temperature 0.7": {"mode": "full", **SAMPLED},
    "lossless, temperature 0.7": {"mode": "lossless", **SAMPLED},
    "trained, temperature 0.7": {"mode": "lossless", "drafter": "trained", **SAMPLED},
}


@dataclass
class ModeRow:
    """One mode's figures.

    tokens_a_round: of rounds with drafts, which accept some tokens and choose one more; None where
    there were none. differing: tokens that are not full depth's, in lossless mode; agreement: the
    share that is full depth's after the same text, in exit mode; equal_texts: to the CPU's, None
    where these were not generated.
    """

    mode: str
    microseconds: float
    mean_depth: float
    tokens_a_round: float | None
    differing: int | None
    agreement: float | None
    equal_texts: int | None


def code_prompts() -> list[str]:
    """Cuts that are evenly spread over the modules' sources."""
    text = "\n".join(inspect.getsource(module) for module in MODULES)
    step = (len(text) - LENGTH) // (PROMPTS - 1)
    return [text[index * step :][:LENGTH] for index in range(PROMPTS)]


def find_prompts(model: SedacModel, kind: str) -> list[list[int]]:
    """The prompts' tokens."""
    if kind == "chat":
        return chat_prompts(model, CHAT_PROMPTS)
    return [model.encode(prompt) for prompt in code_prompts()]


def modes_of(bundle: str) -> dict[str, dict[str, Any]]:
    """The modes that the bundle has."""
    has_drafter = json.loads(Path(bundle, "bundle.json").read_text()).get("drafter") is not None
    return {name: mode for name, mode in MODES.items() if has_drafter or "trained" not in name}


def generate(
    model: SedacModel, prompts: list[list[int]], mode: dict[str, Any]
) -> list[GenerationOutput]:
    """A text after each prompt, of which earlier ways of generating told nothing."""
    model.core.forget_texts()
    wanted = {"max_new_tokens": NEW_TOKENS, "stop_tokens": []} | mode
    return [model.generate(prompt, **wanted) for prompt in prompts]


def find_agreement(model: SedacModel, prompts: list[list[int]], texts: list[list[int]]) -> float:
    """The share of the tokens in `texts` that full depth chooses after the same text."""
    same, full_depth = 0, model.core.decoding("full")
    for prompt, text in zip(prompts, texts, strict=True):
        followed = model.core.follow([*prompt, *text], full_depth)
        # the first of them was chosen after the second token
        same += sum(map(operator.eq, followed.tokens[len(prompt) - 2 :], text))
    return same / sum(map(len, texts))


def measure(
    model: SedacModel,
    reference: SedacModel | None,
    prompts: list[list[int]],
    modes: dict[str, dict[str, Any]],
) -> Iterator[ModeRow]:
    """Each of `modes`; full depth comes before what is compared with it."""
    generate(model, prompts, {"mode": "full", "max_new_tokens": 8})  # warms up
    full: dict[bool, list[list[int]]] = {}
    for name, mode in modes.items():
        start = time.perf_counter()
        outputs = generate(model, prompts, mode)
        elapsed = time.perf_counter() - start
        texts, is_sampled = [output.tokens for output in outputs], "temperature" in mode
        if mode["mode"] == "full":
            full[is_sampled] = texts
        differing = None
        if mode["mode"] == "lossless":
            pairs = zip(texts, full[is_sampled], strict=True)
            differing = sum(a != b for pair in pairs for a, b in zip(*pair, strict=True))
        exits = mode["mode"] == "exit"
        agreement = find_agreement(model, prompts, texts) if exits else None
        equal = None
        if reference is not None and name in ("full", "exit"):
            pairs = zip(texts, generate(reference, prompts, mode), strict=True)
            equal = sum(text == output.tokens for text, output in pairs)
        tokens = sum(map(len, texts))
        depth = sum(output.mean_exit_layer * len(output.tokens) for output in outputs) / tokens
        rounds = sum(output.verify_passes for output in outputs)
        accepted = sum(output.accepted for output in outputs)
        a_round = 1 + accepted / rounds if rounds else None
        microseconds = 1e6 * elapsed / tokens
        yield ModeRow(name, microseconds, depth, a_round, differing, agreement, equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", required=True, metavar="BUNDLE")
    parser.add_argument("--prompts", choices=("code", "chat"), default="code")
    parser.add_argument("--cpu", action="store_true", help="generate on the CPU too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    model = SedacModel.from_pretrained(arguments.engines, backend="cuda")
    reference = None
    if arguments.cpu:
        reference = SedacModel.from_pretrained(arguments.engines, backend="onnxruntime")
    prompts = find_prompts(model, arguments.prompts)
    rows = list(measure(model, reference, prompts, modes_of(arguments.engines)))
    if arguments.json:
        print(json.dumps({"engines": arguments.engines, "rows": [asdict(row) for row in rows]}))
        return
    print(
        "| mode | µs a token | mean depth | tokens a round | differing tokens | agreement | texts"
        " equal to the CPU's |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        a_round = f"{row.tokens_a_round:.2f}" if row.tokens_a_round else ""
        agreement = f"{row.agreement:.1%}" if row.agreement is not None else ""
        differing, equal = ("" if n is None else str(n) for n in (row.differing, row.equal_texts))
        cells = [row.mode, f"{row.microseconds:.0f}", f"{row.mean_depth:.1f}", a_round, differing]
        cells += [agreement, equal]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

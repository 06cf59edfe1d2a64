"""What a model gives when sequences are generated together, and whether texts stay the same.

Prompts of 240 characters from modules of the standard library, 96 tokens after each. A figure is
all tokens over the time of all generations, prompts and Python included: first one after another,
then by a scheduler that runs so many at once. Every setting has a model of its own, since drafters
learn from earlier texts. Rounds interleave the settings; figures are medians.

    python benchmarks/batching.py --engines BUNDLE [--backend cuda] [--json]
    python benchmarks/batching.py --engines BUNDLE --modes full lossless --prompts 8 --rounds 5
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from operator import ne, truediv
from statistics import median
from typing import Any

from models_on_gpu import code_prompts

from sedac_runtime import SedacModel
from sedac_runtime._core import DecodingSetting, Sampling, Scheduler

NEW_TOKENS = 96
SEQUENCES = (1, 2, 4, 8, 16, 32)
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"mode": "full"}, {}),
    "full, temperature 0.7": ({"mode": "full"}, {"temperature": 0.7, "seed": 3}),
    "exit": ({"mode": "exit", "drafter": "none"}, {}),
    "lossless": ({"mode": "lossless"}, {}),
}


@dataclass
class BatchRow:
    """Tokens a second of one mode, one text after another (sequences 0) or together.

    ratio: to one after another, in the same round. differing: texts that are not those of one after
    another, of `texts` in all rounds.
    """

    mode: str
    sequences: int
    tokens_per_second: float
    ratio: float
    differing: int
    texts: int


@dataclass
class Work:
    """How to continue which prompts."""

    prompts: list[list[int]]
    decoding: DecodingSetting
    sampling: Sampling


def alone(model: SedacModel, work: Work) -> list[list[int]]:
    """The texts, one after another."""
    texts = []
    for prompt in work.prompts:
        generation = model.core.generate(
            prompt, work.decoding, work.sampling, max_new_tokens=NEW_TOKENS, stop_tokens=[]
        )
        generation.finish()
        texts.append([token.id for token in generation.summary().tokens])
    return texts


def together(model: SedacModel, sequences: int, work: Work) -> list[list[int]]:
    """The texts, up to `sequences` at once."""
    scheduler = Scheduler(model.core, max_sequences=sequences)
    numbers = [
        scheduler.add(
            prompt, work.decoding, work.sampling, max_new_tokens=NEW_TOKENS, stop_tokens=[]
        )
        for prompt in work.prompts
    ]
    texts: dict[int, list[int]] = {number: [] for number in numbers}
    unfinished = set(numbers)
    while unfinished:
        for progress in scheduler.step():
            if progress.error is not None:
                raise RuntimeError(progress.error)
            texts[progress.sequence] += [token.id for token in progress.tokens]
            if progress.finish_reason is not None:
                unfinished.remove(progress.sequence)
    return [texts[number] for number in numbers]


def measure(arguments: argparse.Namespace) -> Iterator[BatchRow]:
    """Every mode, one after another and with each number of sequences."""
    for name in arguments.modes:
        speeds: dict[int, list[float]] = {}
        differing: Counter[int] = Counter()
        for _ in range(arguments.rounds):
            expected: list[list[int]] = []
            for sequences in (0, *SEQUENCES):
                texts, elapsed = run(arguments, name, sequences)
                expected = expected or texts
                speeds.setdefault(sequences, []).append(sum(map(len, texts)) / elapsed)
                differing[sequences] += sum(map(ne, texts, expected))
        for sequences, speed in speeds.items():
            ratio = median(map(truediv, speed, speeds[0]))
            count = arguments.prompts * arguments.rounds
            yield BatchRow(name, sequences, median(speed), ratio, differing[sequences], count)


def run(arguments: argparse.Namespace, name: str, sequences: int) -> tuple[list[list[int]], float]:
    """The texts of one setting, and the seconds that they take."""
    model = SedacModel.from_pretrained(
        arguments.engines, backend=arguments.backend, verify="changed"
    )
    model.generate("def ", max_new_tokens=8, mode="full")  # warms up
    mode, sampled = MODES[name]
    encoded = [model.encode(prompt) for prompt in code_prompts()[: arguments.prompts]]
    work = Work(encoded, model.core.decoding(**mode), Sampling(**sampled))
    start = time.perf_counter()
    texts = together(model, sequences, work) if sequences else alone(model, work)
    return texts, time.perf_counter() - start


def main() -> None:
    """Print a row for each measurement, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", required=True)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for row in measure(arguments):
        rows.append(asdict(row))
        if not arguments.json:
            print(
                f"{row.mode}: {row.sequences or 'one after another'}:"
                f" {row.tokens_per_second:.0f} tokens/s, {row.ratio:.2f}x,"
                f" {row.differing} of {row.texts} texts differ",
                flush=True,
            )
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()

"""What a model gives when sequences are generated together, and whether texts stay the same.

32 prompts of 240 characters from modules of the standard library, 96 tokens after each. A figure is
all tokens over the time of all generations, prompts and Python included: first one after another,
then by a scheduler that runs so many at once. Every setting has a model of its own, since drafters
learn from earlier texts.

    python benchmarks/batching.py --engines BUNDLE [--backend cuda] [--json]
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from models_on_gpu import code_prompts

from sedac_runtime import SedacModel
from sedac_runtime._core import DecodingSetting, Sampling, Scheduler

PROMPTS, NEW_TOKENS = 32, 96
SEQUENCES = (1, 2, 4, 8, 16)
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"mode": "full"}, {}),
    "full, temperature 0.7": ({"mode": "full"}, {"temperature": 0.7, "seed": 3}),
    "exit": ({"mode": "exit", "drafter": "none"}, {}),
    "lossless": ({"mode": "lossless"}, {}),
}


@dataclass
class BatchRow:
    """Tokens a second of one mode, one text after another (sequences 0) or together.

    differing: texts that are not those of one after another.
    """

    mode: str
    sequences: int
    tokens_per_second: float
    differing: int


def encoded(model: SedacModel) -> list[list[int]]:
    """The prompts' tokens."""
    return [model.encode(prompt) for prompt in code_prompts()[:PROMPTS]]


def alone(model: SedacModel, decoding: DecodingSetting, sampling: Sampling) -> list[list[int]]:
    """The texts, one after another."""
    texts = []
    for prompt in encoded(model):
        generation = model._core.generate(
            prompt, decoding, sampling, max_new_tokens=NEW_TOKENS, stop_tokens=[]
        )
        generation.finish()
        texts.append([token.id for token in generation.summary().tokens])
    return texts


def together(
    model: SedacModel, sequences: int, decoding: DecodingSetting, sampling: Sampling
) -> list[list[int]]:
    """The texts, up to `sequences` at once."""
    scheduler = Scheduler(model._core, max_sequences=sequences)
    numbers = [
        scheduler.add(prompt, decoding, sampling, max_new_tokens=NEW_TOKENS, stop_tokens=[])
        for prompt in encoded(model)
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


def measure(bundle: str, backend: Any) -> Iterator[BatchRow]:
    """Every mode, one after another and with each number of sequences."""
    for name, (mode, sampled) in MODES.items():
        expected: list[list[int]] = []
        for sequences in (0, *SEQUENCES):
            model = SedacModel.from_pretrained(bundle, backend=backend, verify="changed")
            model.generate("def ", max_new_tokens=8, mode="full")  # warms up
            decoding, sampling = model._core.decoding(**mode), Sampling(**sampled)
            start = time.perf_counter()
            if sequences == 0:
                texts = expected = alone(model, decoding, sampling)
            else:
                texts = together(model, sequences, decoding, sampling)
            elapsed = time.perf_counter() - start
            differing = sum(ours != theirs for ours, theirs in zip(texts, expected, strict=True))
            yield BatchRow(name, sequences, sum(map(len, texts)) / elapsed, differing)


def main() -> None:
    """Print a row for each measurement, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", required=True)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for row in measure(arguments.engines, arguments.backend):
        rows.append(asdict(row))
        if not arguments.json:
            print(
                f"{row.mode}: {row.sequences or 'one after another'}:"
                f" {row.tokens_per_second:.0f} tokens/s, {row.differing} texts differ",
                flush=True,
            )
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()

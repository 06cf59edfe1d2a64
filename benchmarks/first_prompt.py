"""Speed of lossless mode over full depth on the first prompt of a process, load excluded.

Every prompt is answered in each mode by a process of its own, `--repeats` times, the two modes one
after the other in random order. They share a cache directory that starts with nothing but what
loading the bundle once leaves there. A speedup is the median over the repeats of full depth's
decoding time over lossless mode's; a prompt is slow if it is below 0.97 by more than two standard
errors.

    python benchmarks/first_prompt.py BUNDLE --prompts code --count 8
    python benchmarks/first_prompt.py BUNDLE --prompts chat --count 40 --repeats 10
"""

import argparse
import math
import os
import random
import statistics
import sysconfig
import tempfile
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from chat_prompts import QUESTIONS, edits

from sedac_runtime import SedacModel

MODES = ("full", "lossless")
SLOW = 0.97
PACKAGES = ("asyncio", "email", "http", "json", "logging", "unittest")
MIN_REPEATS = 2
CUT = 3000
CODE_TOKENS = 128


@dataclass(frozen=True)
class Answer:
    """What one process gave: milliseconds for all tokens but the first, and the tokens."""

    decode_ms: float
    tokens: list[int]


def code_prompts(model: SedacModel, count: int) -> list[list[int]]:
    """`count` cuts of CODE_TOKENS tokens from standard-library packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for package in PACKAGES for path in sorted((library / package).rglob("*.py"))]
    files = [path for path in files if path.stat().st_size > 2 * CUT]
    choose = random.Random(0)
    found = []
    for path in choose.sample(files, count):
        text = path.read_text(encoding="utf-8", errors="ignore")
        start = choose.randrange(len(text) - CUT)
        found.append(model.encode(text[start : start + CUT])[:CODE_TOKENS])
    return found


def chat_prompts(model: SedacModel, count: int) -> list[list[int]]:
    """`count` prompts in the bundle's chat template: questions and edits in turn."""
    pairs = zip(QUESTIONS, edits(), strict=True)
    texts = [text for pair in pairs for text in pair][:count]
    return [model.encode_chat([{"role": "user", "content": text}]) for text in texts]


def answer(bundle: Path, threads: int, mode: str, prompt: list[int], new_tokens: int) -> Answer:
    """Load the bundle and generate."""
    model = SedacModel.from_pretrained(bundle, threads=threads)
    output = model.generate(prompt, mode=mode, max_new_tokens=new_tokens, stop_tokens=[])
    return Answer(output.decode_ms, list(output.tokens))


def is_slow(speedups: list[float]) -> bool:
    """Whether the speedups are below SLOW by more than two standard errors."""
    logarithms = [math.log(speedup) for speedup in speedups]
    error = statistics.stdev(logarithms) / math.sqrt(len(logarithms))
    return statistics.mean(logarithms) + 2 * error < math.log(SLOW)


def measure(arguments: argparse.Namespace, processes: Executor, prompts: list[list[int]]) -> None:
    bundle, threads, new_tokens = arguments.bundle, arguments.threads, arguments.new_tokens
    order = random.Random(1)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    medians, slow, differ = [], 0, 0
    for index, prompt in enumerate(prompts):
        speedups = []
        for _ in range(arguments.repeats):
            given = {
                mode: processes.submit(answer, bundle, threads, mode, prompt, new_tokens).result()
                for mode in order.sample(MODES, len(MODES))
            }
            full, lossless = (given[mode] for mode in MODES)
            speedups.append(full.decode_ms / lossless.decode_ms)
            differ += full.tokens != lossless.tokens
            for mode in MODES:
                times[mode].append(given[mode].decode_ms)
        medians.append(statistics.median(speedups))
        slow += is_slow(speedups)
        shown = " ".join(f"{speedup:.2f}" for speedup in sorted(speedups))
        print(f"prompt {index}: {medians[-1]:.2f}x of {shown}", flush=True)
    total = sum(times["full"]) / sum(times["lossless"])
    per_token = statistics.median(times["full"]) / (new_tokens - 1)
    print(
        f"{bundle}: full depth {per_token:.2f} ms/token, lossless {total:.2f}x, median"
        f" {statistics.median(medians):.2f}x, minimum {min(medians):.2f}x, {slow} of"
        f" {len(prompts)} prompts slow, {differ} texts differ"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", choices=("code", "chat"), default="code")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.repeats < MIN_REPEATS:
        parser.error(f"--repeats must be at least {MIN_REPEATS}")
    # one process for each answer
    fresh = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as cache, fresh as processes:
        os.environ["XDG_CACHE_HOME"] = cache
        model = SedacModel.from_pretrained(arguments.bundle, threads=arguments.threads)
        cut = code_prompts if arguments.prompts == "code" else chat_prompts
        prompts = cut(model, arguments.count)
        del model
        measure(arguments, processes, prompts)


if __name__ == "__main__":
    main()

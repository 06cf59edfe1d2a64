"""Decoding speed of SEDAC and its peers on SmolLM2-135M-Instruct, in one interleaved run.

Each runtime has a process of its own, which waits while another works. In every round all of them
generate greedily after the same prompts, in random order. A figure is the median over the rounds.
Agreement is the share of generated tokens that transformers would have chosen after the same text.

    make benchmark
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from peer_models import prepare
from transformers import AutoTokenizer, PreTrainedTokenizerBase

CHAT = (
    "Explain photosynthesis to a ten-year-old.",
    "Give me a recipe for pancakes with quantities in grams.",
    "Name three differences between TCP and UDP and explain each of them.",
)
CODE = (
    "def reverse_linked_list(head):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import argparse\n\ndef parse_arguments():\n    parser = argparse.ArgumentParser()\n",
)

# the row's name, its process, and the mode where that has several
ROWS = (
    ("transformers, fp32", "transformers", ""),
    ("onnxruntime-genai, fp32", "genai-fp32", ""),
    ("SEDAC full depth, fp32", "sedac", "full"),
    ("SEDAC lossless, fp32", "sedac", "lossless"),
    ("llama.cpp, Q4_1", "llama.cpp", ""),
    ("onnxruntime-genai, int4", "genai-int4", ""),
)


class Worker:
    """A process that runs one runtime."""

    def __init__(self, runtime: str, path: Path, threads: int) -> None:
        script = Path(__file__).with_name("peer_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, script, runtime, path, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def encode(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Token ids of the prompts, by kind."""
    chats = [[{"role": "user", "content": text}] for text in CHAT]
    return {
        "chat": [
            list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
            for chat in chats
        ],
        "code": [tokenizer(text)["input_ids"] for text in CODE],
    }


def measure(
    workers: dict[str, Worker], prompts: list[list[int]], rounds: int, new_tokens: int
) -> dict[str, list[dict[str, float]]]:
    """By row, for each round after the first: prefill (s a prompt), speed (tokens/s), agreement."""
    shuffle = random.Random(0)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for current in range(rounds + 1):
        answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for prompt in prompts:
            for name, runtime, mode in shuffle.sample(ROWS, len(ROWS)):
                answer = workers[runtime].ask(prompt=prompt, new_tokens=new_tokens, mode=mode)
                answers[name].append(answer)
        if current == 0:
            continue  # warms up
        for name, given in answers.items():
            found[name].append(summarise(workers["transformers"], prompts, given))
    return found


def summarise(
    judge: Worker, prompts: list[list[int]], answers: list[dict[str, Any]]
) -> dict[str, float]:
    """One round of one row, over all prompts."""
    decoded = sum(len(answer["tokens"]) - 1 for answer in answers)
    shares = [
        judge.ask(prompt=prompt, tokens=answer["tokens"])["agreement"]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return {
        "prefill": statistics.mean(answer["prefill"] for answer in answers),
        "speed": decoded / sum(answer["decode"] for answer in answers),
        "agreement": statistics.mean(shares),
    }


def print_table(kind: str, rows: dict[str, list[dict[str, float]]]) -> None:
    """One line for each runtime, in the order of ROWS."""
    base = [one["speed"] for one in rows[ROWS[0][0]]]
    print(f"\n| {kind} | prefill, ms | tokens/s | min | max | against transformers | agreement |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, *_ in ROWS:
        speeds = [one["speed"] for one in rows[name]]
        ratio = statistics.median(mine / theirs for mine, theirs in zip(speeds, base, strict=True))
        prefill = 1e3 * statistics.median(one["prefill"] for one in rows[name])
        agreement = 100 * statistics.median(one["agreement"] for one in rows[name])
        print(
            f"| {name} | {prefill:.0f} | {statistics.median(speeds):.0f} | {min(speeds):.0f} |"
            f" {max(speeds):.0f} | {ratio:.2f}x | {agreement:.1f} % |"
        )


def print_summary(found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Median decoding speed and agreement by kind of prompt, one line for each runtime."""
    kinds = list(found)
    print("\n| | " + " | ".join(f"{kind}, tokens/s | agreement" for kind in kinds) + " |")
    print("| --- |" + " --- | --- |" * len(kinds))
    for name, *_ in ROWS:
        cells = []
        for kind in kinds:
            rows = found[kind][name]
            cells.append(f"{statistics.median(one['speed'] for one in rows):.0f}")
            cells.append(f"{100 * statistics.median(one['agreement'] for one in rows):.1f} %")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("target/benchmark"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    paths = prepare(arguments.directory, arguments.threads)
    prompts = encode(AutoTokenizer.from_pretrained(paths["transformers"]))
    workers = {name: Worker(name, path, arguments.threads) for name, path in paths.items()}
    found = {}
    try:
        for kind, cut in prompts.items():
            found[kind] = measure(workers, cut, arguments.rounds, arguments.new_tokens)
            print_table(kind, found[kind])
        print_summary(found)
    finally:
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()

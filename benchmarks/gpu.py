"""What a token takes on this host's NVIDIA GPU: SEDAC's kernel beside other runtimes.

Random fp16 weights, greedy, one sequence, around position 511 of 1024, head included, from the
launch of a pass to its token on the host; the first token after a prompt; and a token of each of
32 sequences that are decoded together. Every runtime has a process of its own; in each of 5 rounds
all of them run, in random order. A figure is the median of the rounds' means; percentiles are of
single passes. The floor is the weights' bytes over the rate of a copy on the device. A runtime that
is not installed or fails is a row that says why.

    python benchmarks/gpu.py [--json] [--shapes SmolLM2-135M ...] [--minutes 10]

SEDAC's kernel needs the extra sedac[cuda] and PyTorch built for CUDA; the others are transformers
and onnxruntime-genai-cuda. benchmarks/chain_kernel.py checks the kernel and measures it without
waiting for each pass.
"""

import argparse
import contextlib
import importlib.metadata
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from chain_cases import MODELS
from chain_decoder import ChainCase
from chain_kernel import describe_host, measure_copy, weight_bytes
from gpu_worker import SEQUENCES

from sedac_export.bundle.cuda_entry import ChainShape
from sedac_export.cuda.compiler import ROWS, Compiler
from sedac_export.errors import SedacError

ROUNDS, PASSES, PROMPTS = 5, 32, 8
# tokens of the prompt before the first token
PROMPT = 512
# s of a shape's time that are left for the runtimes that have loaded by then
MEASURING = 15
NAMES = ("SmolLM2-135M", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Llama-3.2-1B", "Mistral-7B")
PEERS = {
    "transformers": "transformers, static cache, compiled",
    "onnxruntime-genai": "onnxruntime-genai",
}
VERSIONS = ("transformers", "onnxruntime-genai-cuda", "onnxruntime-gpu", "onnxruntime")


@dataclass
class RuntimeRow:
    """What one runtime is asked for, and the microseconds of its passes by round.

    failure is why there are none.
    """

    name: str
    runtime: str
    request: dict[str, int] = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)
    failure: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The row in the report."""
        row: dict[str, Any] = {"name": self.name, "runtime": self.runtime, **self.request}
        if not self.rounds:
            return row | {"failure": self.failure or "the time was up"}
        means = [statistics.mean(times) for times in self.rounds]
        deciles = statistics.quantiles([time for times in self.rounds for time in times], n=10)
        percentiles = {"p10": deciles[0], "p50": deciles[4], "p90": deciles[8]}
        return row | {"microseconds": statistics.median(means), "rounds": means} | percentiles


class Worker:
    """A process that runs one runtime, and writes what it has to say to a file in `directory`."""

    def __init__(self, command: list[str], runtime: str, directory: Path) -> None:
        self._log = directory / f"{runtime}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._reader = ThreadPoolExecutor(1)
        self._ready = self._reader.submit(self._read)

    def wait(self, deadline: float) -> str | None:
        """Wait until it is loaded; why it is not, if it is not."""
        try:
            answer = self._ready.result(max(0, deadline - time.monotonic()))
        except TimeoutError:
            return "it took too long to load; --minutes gives it more"
        if isinstance(answer, dict) and answer.get("ready"):
            return None
        return str(answer.get("error")) if isinstance(answer, dict) else self._last_words()

    def ask(self, request: dict[str, int], deadline: float) -> list[float]:
        """Microseconds of passes. Raises RuntimeError when it fails."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._reader.submit(self._read).result(max(1, deadline - time.monotonic()))
        except (OSError, TimeoutError) as error:
            raise RuntimeError(self._last_words()) from error
        if not isinstance(answer, list):
            raise RuntimeError(self._last_words())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._reader.shutdown()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # a request may be left that nobody reads
                if stream is not None:
                    stream.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def _last_words(self) -> str:
        lines = self._log.read_text().strip().splitlines()
        return lines[-1] if lines else "it ended without a word"


def rows_of(shape: ChainShape) -> list[RuntimeRow]:
    """All that is measured of a shape."""
    depths = [shape.layers // part for part in (1, 2, 4, 8)]
    rows = [RuntimeRow("SEDAC", "sedac", {"rows": 1, "layers": depth}) for depth in depths]
    rows += [
        RuntimeRow("SEDAC", "sedac", {"rows": count, "layers": shape.layers}) for count in ROWS[1:]
    ]
    rows += [
        RuntimeRow(f"SEDAC, position {position} of 4096", "sedac-long", {"position": position})
        for position in (500, 4000)
    ]
    rows += [RuntimeRow(name, runtime) for runtime, name in PEERS.items()]
    # a prompt is not what peers compile for
    names = {"sedac": "SEDAC"} | {runtime: runtime for runtime in PEERS}
    rows += [RuntimeRow(name, runtime, {"prompt": PROMPT}) for runtime, name in names.items()]
    names |= PEERS
    return rows + [
        RuntimeRow(name, runtime, {"sequences": SEQUENCES}) for runtime, name in names.items()
    ]


def measure(rows: list[RuntimeRow], workers: dict[str, Worker], deadline: float) -> None:
    """Fill `rows`, round by round."""
    loaded = deadline - MEASURING
    failures = {runtime: worker.wait(loaded) for runtime, worker in workers.items()}
    for row in rows:
        row.failure = failures[row.runtime]
    shuffle = random.Random(0)
    for _ in range(ROUNDS):
        for row in shuffle.sample(rows, len(rows)):
            if row.failure is None and time.monotonic() < deadline:
                try:
                    passes = PROMPTS if "prompt" in row.request else PASSES
                    times = workers[row.runtime].ask(row.request | {"passes": passes}, deadline)
                except RuntimeError as error:
                    row.failure = str(error)
                else:
                    row.rounds.append(times)


def run_shape(case: ChainCase, directory: Path, deadline: float) -> list[RuntimeRow]:
    """The rows of a shape; its workers load at the same time and then wait for their turns."""
    rows = rows_of(case.shape)
    script = str(Path(__file__).with_name("gpu_worker.py"))
    place = directory / case.name
    place.mkdir(parents=True)
    workers = {
        runtime: Worker([sys.executable, script, runtime, case.name, str(place)], runtime, place)
        for runtime in dict.fromkeys(row.runtime for row in rows)
    }
    try:
        measure(rows, workers, deadline)
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def report(case: ChainCase, rows: list[RuntimeRow], copy_rate: float) -> dict[str, Any]:
    """A shape's figures; floors in microseconds, of all layers and of the head."""
    layer, head = (1e6 * size / copy_rate for size in weight_bytes(case))
    floor = {"layers": case.shape.layers * layer, "head": head}
    return {"name": case.name, "floor": floor, "rows": [row.as_json() for row in rows]}


def markdown(shape: dict[str, Any], layers: int) -> str:
    """A shape's figures for people."""
    floor = shape["floor"]
    passes = [row for row in shape["rows"] if not {"prompt", "sequences"} & row.keys()]
    lines = [
        f"\n## {shape['name']}: {layers} layers, floor {sum(floor.values()):.0f} µs\n",
        "| runtime | layers | rows | µs a pass | p10, p50, p90 | floor's share |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in passes:
        depth = row.get("layers", layers)
        cells = [row["name"], str(depth), str(row.get("rows", 1))]
        if "failure" in row:
            lines.append(f"| {' | '.join(cells)} | {row['failure'].replace('|', '/')} | | |")
            continue
        least = floor["layers"] * depth / layers + floor["head"]
        percentiles = ", ".join(f"{row[name]:.0f}" for name in ("p10", "p50", "p90"))
        share = least / row["microseconds"]
        cells += [f"{row['microseconds']:.0f}", percentiles, f"{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    first = [
        f"{row['name']} {row['microseconds'] / 1e3:.1f} ms"
        for row in shape["rows"]
        if "prompt" in row and "failure" not in row
    ]
    if first:
        lines.append(f"\nFirst token after a prompt of {PROMPT}: {', '.join(first)}.")
    together = [
        f"{row['name']} {row['microseconds']:.0f} µs"
        f" ({SEQUENCES * 1e6 / row['microseconds']:.0f} tokens/s)"
        for row in shape["rows"]
        if "sequences" in row and "failure" not in row
    ]
    if together:
        lines.append(f"\nA token of each of {SEQUENCES} sequences: {', '.join(together)}.")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of the peers' packages that are installed."""
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    return {name: found[name] for name in VERSIONS if name in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--minutes", type=float, default=20, help="for all shapes together")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no NVIDIA GPU")
    try:
        host = describe_host(Compiler()) | versions()
    except SedacError as error:
        parser.error(str(error))
    copy_rate, shapes = measure_copy(), []
    torch.cuda.empty_cache()
    if not arguments.json:
        named = ", ".join(f"{name} {value}" for name, value in host.items())
        print(f"{named}; copies at {copy_rate / 1e12:.2f} TB/s")
    cases = [case for case in MODELS if case.name in arguments.shapes]
    for index, case in enumerate(cases):
        share = (deadline - time.monotonic()) / (len(cases) - index)
        with tempfile.TemporaryDirectory(prefix="sedac-gpu-") as directory:
            rows = run_shape(case, Path(directory), time.monotonic() + share)
        shapes.append(report(case, rows, copy_rate))
        if not arguments.json:
            print(markdown(shapes[-1], case.shape.layers), flush=True)
    if arguments.json:
        measured = {"copy_bytes_per_second": copy_rate, "shapes": shapes}
        print(json.dumps({"host": host} | measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The chain's kernel alone, on random weights: is it right, and how long do passes take?

Needs an NVIDIA GPU that the chain is compiled for, and PyTorch built for CUDA. Each shape is first
checked against PyTorch in fp32, and for the same bits in any pass. A figure is the median of 5
rounds of 50 passes; the floor is the weights' bytes over the rate of a copy on the device.
Positions 500 and 4000 are measured in caches of 4096.

    python benchmarks/chain_kernel.py [--json] [--shapes SmolLM2-135M ...] [--weights int4]
        [--architecture NAME]

With --architecture compute_86, say, the driver compiles the PTX for such GPUs, within their shared
memory and by their way of filling rings, for a newer card.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from chain_batch_checks import BatchChecks
from chain_batch_exit_checks import BatchExitChecks
from chain_cases import MODELS, TINY, TINY_GEMMA
from chain_checks import ChainChecks
from chain_decoder import ChainCase
from chain_drafter import RandomDrafter
from chain_drafter_checks import DrafterChecks
from chain_launcher import (
    ChainLauncher,
    SequenceInput,
    card_architecture,
    compile_chain,
)
from chain_weights import FORMATS
from kernel_check import TOKENS, TOLERANCE, KernelCheck, relative_error

from sedac_export.cuda.chain_abi import (
    BATCH_LOGITS_ROWS,
    BATCH_ROWS,
    DRAFT_SEQUENCES,
    MAX_ROWS,
    SMALL_BATCH_ROWS,
    BatchPass,
    BatchRow,
    Pass,
)
from sedac_export.cuda.compiler import ROWS, CompiledChain, Compiler
from sedac_export.cuda.loaded_chain import UnsupportedGpuError
from sedac_export.cuda.weight_blocks import BLOCK, TILE
from sedac_export.errors import SedacError
from sedac_runtime.flavour import find_gpu

MODEL_NAMES = tuple(case.name for case in MODELS)
# tokens of a draft, and the sequences that one is made for
DRAFTED = ((1, 1), (4, 1), (8, 1), (1, 4), (4, 4), (1, DRAFT_SEQUENCES), (4, DRAFT_SEQUENCES))
# tokens of a prefill
PREFILLED = (32, 64, 128, 256, BATCH_ROWS)
# sequences of a batch, each with its newest token behind so many others
BATCHED, BEHIND, BATCH_CAPACITY = (9, 16, 32, BATCH_LOGITS_ROWS), 500, 2048
ROUNDS, PASSES, BATCHES, WARM_UP = 5, 50, 10, 5
COPIES, COPIED_BYTES = 10, 1 << 30
POSITIONS, LONG_CAPACITY = (500, 4000), 4096
LONGEST_CAPACITY = 32768
# a position from which attention divides keys anew, of any shape
DIVISION = 4096


@dataclass(frozen=True)
class Timing:
    """Microseconds a pass: the rounds' median, and percentiles of passes by the device's clock."""

    median: float
    device_p10: float
    device_p50: float
    device_p90: float


@dataclass(frozen=True)
class Measurement:
    """Passes of `rows` tokens of one sequence through `layers` layers; floors in microseconds.

    steps: of a pass, each with the token that the one before chose; times and floors are of one.
    """

    rows: int
    layers: int
    steps: int
    without_head: Timing
    with_head: Timing
    layers_floor: float
    head_floor: float


@dataclass
class CaseResult:
    """What came of a case; unsupported is why the card cannot run it."""

    name: str
    checks: list[KernelCheck] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    positions: dict[int, Timing] = field(default_factory=dict)
    # at the end of a cache of LONGEST_CAPACITY positions
    longest: Timing | None = None
    # by tokens and sequences, microseconds of a launch that takes in a position of each, and drafts
    drafts: dict[str, float] = field(default_factory=dict)
    # by the number of tokens, microseconds of a prefill from position 0 on
    prefills: dict[int, float] = field(default_factory=dict)
    # by the layers that it ran, microseconds of a token whose exit fills the caches of the others
    fills: dict[int, float] = field(default_factory=dict)
    # by the number of sequences, microseconds of a batch of their newest tokens
    batches: dict[int, float] = field(default_factory=dict)
    unsupported: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every check that ran did."""
        return all(check.passed for check in self.checks)


def run_case(case: ChainCase, compiling: "Future[CompiledChain]", copy_rate: float) -> CaseResult:
    """Check the case, and measure it if it is a model's; copy_rate in bytes/s."""
    result = CaseResult(case.name)
    try:
        launcher = ChainLauncher(case, compiling.result())
        result.checks.extend(ChainChecks(launcher).run())
        result.checks.extend(DrafterChecks(launcher).run())
        result.checks.extend(BatchChecks(launcher).run())
        result.checks.extend(BatchExitChecks(launcher).run())
        if case.name in MODEL_NAMES:
            result.measurements.extend(measure(launcher, copy_rate))
            result.fills = measure_fills(launcher)
            result.prefills = measure_prefills(launcher)
            del launcher
            torch.cuda.empty_cache()
            several = dataclasses.replace(case, capacity=BATCH_CAPACITY)
            launcher = ChainLauncher(several, compiling.result(), slots=max(BATCHED))
            result.batches = measure_batches(launcher)
            result.drafts = measure_drafts(launcher)
            del launcher
            torch.cuda.empty_cache()
            long = dataclasses.replace(case, capacity=LONG_CAPACITY)
            result.positions = measure_positions(ChainLauncher(long, compiling.result(), slots=1))
            torch.cuda.empty_cache()
            longest = dataclasses.replace(case, capacity=LONGEST_CAPACITY)
            launcher = ChainLauncher(longest, compiling.result(), slots=2)
            result.checks.extend(check_division(launcher))
            result.checks.extend(check_longest(launcher))
            result.longest = measure_longest(launcher)
    except (UnsupportedGpuError, torch.cuda.OutOfMemoryError) as error:
        result.unsupported = str(error).splitlines()[0]
    return result


def measure(launcher: ChainLauncher, copy_rate: float) -> Iterator[Measurement]:
    """All layers with 1, 2, 4 and 8 rows, and one row through a half, a quarter and an eighth."""
    # steps end where a chunk of attention begins
    shape, position = launcher.decoder.shape, launcher.decoder.case.position + 1
    launcher.fill(0, position)
    combinations = [(rows, shape.layers, 1) for rows in ROWS]
    combinations += [
        (1, shape.layers // part, steps) for steps in (1, MAX_ROWS) for part in (1, 2, 4, 8)
    ][1:]
    sizes = weight_bytes(launcher.decoder.case)
    layer_floor, head_floor = (1e6 * size / copy_rate for size in sizes)
    for rows, layers, steps in combinations:
        tokens = [(token, position + row, 0) for row, token in enumerate(TOKENS[:rows])]
        sequences = [SequenceInput(tokens, max_depth=layers)]
        without_head = time_pass(launcher, launcher.make_pass(sequences, logits_rows=0))
        yield Measurement(
            rows,
            layers,
            steps,
            without_head,
            time_pass(launcher, launcher.make_pass(sequences, steps=steps)),
            layers * layer_floor,
            head_floor,
        )


def measure_fills(launcher: ChainLauncher) -> dict[int, float]:
    """As `measure` does of steps, after the last layer but one, a half, a quarter and an eighth."""
    layers, position = launcher.decoder.shape.layers, launcher.decoder.case.position + 1
    medians = {}
    for depth in (layers - 1, *(layers // part for part in (2, 4, 8))):
        sequence = SequenceInput.of_tokens(TOKENS[:1], position, max_depth=depth, fills=True)
        wanted = launcher.make_pass([sequence], steps=MAX_ROWS)
        medians[depth] = time_pass(launcher, wanted).median
    return medians


def measure_positions(launcher: ChainLauncher) -> dict[int, Timing]:
    """One row through all layers and the head, at a short and at a long context."""
    launcher.fill(0, max(POSITIONS))
    return {
        position: time_pass(
            launcher, launcher.make_pass([SequenceInput([(TOKENS[0], position, 0)])])
        )
        for position in POSITIONS
    }


def check_division(launcher: ChainLauncher) -> Iterator[KernelCheck]:
    """Logits about a position from which attention divides keys anew: alone, in passes, batched."""
    half = MAX_ROWS // 2
    first, before = DIVISION - half, SMALL_BATCH_ROWS
    tokens = [token % launcher.decoder.shape.vocabulary for token in range(before + MAX_ROWS)]

    def passes(rows: int) -> torch.Tensor:
        starts = range(0, len(tokens), rows)
        return torch.cat(
            [
                launcher.run([SequenceInput.of_tokens(tokens[at : at + rows], first - before + at)])
                for at in starts
            ]
        )

    launcher.fill(1, half)
    history = launcher.fill(0, first - before)
    with torch.no_grad():
        wanted = launcher.decoder.compute(history, tokens).logits
    alone = passes(1)
    error = relative_error(alone, wanted)
    yield KernelCheck(f"logits about {DIVISION}", error < TOLERANCE, f"relative error {error:.1e}")
    launcher.fill(0, first - before)
    same = torch.equal(passes(half), alone)
    yield KernelCheck(f"the same in passes up to {DIVISION} and from there on", same)
    newest = SequenceInput.of_tokens(tokens[-half:], DIVISION)
    short = SequenceInput.of_tokens(tokens[:half], half, slot=1)
    beside = launcher.run([short, newest])
    same = torch.equal(beside[half:], alone[-half:])
    same &= torch.equal(beside[:half], launcher.run([short]))
    yield KernelCheck(f"the same from {DIVISION} on beside a short sequence", same)
    for count in (MAX_ROWS, len(tokens)):
        launcher.fill(0, first - before)
        passes(half)
        # what these have written is written again, or not read
        rows = [BatchRow(token, first - before + at, 0) for at, token in enumerate(tokens)][-count:]
        logits = launcher.run_batch(launcher.make_batch(rows, range(count - MAX_ROWS, count)))
        same = torch.equal(logits, alone[-MAX_ROWS:])
        yield KernelCheck(f"the same in a batch of {count} about {DIVISION}", same)


def check_longest(launcher: ChainLauncher) -> Iterator[KernelCheck]:
    """Logits of the last positions of a long cache, against PyTorch."""
    for rows in (1, 3):
        position = launcher.capacity - rows
        history = launcher.fill(0, position)
        with torch.no_grad():
            wanted = launcher.decoder.compute(history, TOKENS[:rows]).logits
        logits = launcher.run([SequenceInput.of_tokens(TOKENS[:rows], position)])
        error = relative_error(logits, wanted)
        name = f"logits, {rows} rows from position {position}"
        yield KernelCheck(name, error < TOLERANCE, f"relative error {error:.1e}")


def measure_longest(launcher: ChainLauncher) -> Timing:
    """One row at the last position."""
    row = (TOKENS[0], launcher.capacity - 1, 0)
    return time_pass(launcher, launcher.make_pass([SequenceInput([row])]))


def measure_drafts(launcher: ChainLauncher) -> dict[str, float]:
    """Launches of a random trained drafter, which the host waits for."""
    drafter, medians = RandomDrafter(launcher), {}
    for count, sequences in DRAFTED:
        parts = [drafter.make(slot, BEHIND, TOKENS[:1], count) for slot in range(sequences)]
        wanted, rounds = drafter.launchable(parts), []
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            for _ in range(PASSES):
                launcher.draft(wanted)
            rounds.append((time.perf_counter() - start) / PASSES * 1e6)
        medians[f"{count} for {sequences}"] = statistics.median(rounds[1:])
    launcher.feature_depths = []
    return medians


def measure_prefills(launcher: ChainLauncher) -> dict[int, float]:
    """The first tokens of a text."""
    vocabulary = launcher.decoder.shape.vocabulary
    texts = {count: [token % vocabulary for token in range(count)] for count in PREFILLED}
    return {
        count: time_batch(launcher, launcher.make_prefill(tokens, 0))
        for count, tokens in texts.items()
    }


def measure_batches(launcher: ChainLauncher) -> dict[int, float]:
    """The newest tokens of several sequences, head included."""
    for slot in range(max(BATCHED)):
        launcher.fill(slot, BEHIND)
    vocabulary = launcher.decoder.shape.vocabulary
    rows = [BatchRow(7 * slot % vocabulary, BEHIND, slot) for slot in range(max(BATCHED))]
    return {
        count: time_batch(launcher, launcher.make_batch(rows[:count], range(count)))
        for count in BATCHED
    }


def time_batch(launcher: ChainLauncher, wanted: BatchPass) -> float:
    """Microseconds, as a graph."""
    launcher.run_batch(wanted)  # loads the kernels
    graph, rounds = launcher.captured(wanted), []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BATCHES):
            graph.replay()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) / BATCHES * 1e6)
    return statistics.median(rounds[1:])


def time_pass(launcher: ChainLauncher, wanted: Pass) -> Timing:
    """Passes one after another, without the host waiting in between; of one of their steps."""
    steps = max(wanted.steps, 1)
    for _ in range(WARM_UP):
        launcher.launch(wanted)
    torch.cuda.synchronize()
    rounds, durations = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for index in range(PASSES):
            launcher.launch(wanted, outcome=index)
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) / PASSES / steps * 1e6)
        outcomes = [launcher.outcome(index) for index in range(PASSES)]
        durations += [
            (outcome.ended[steps - 1] - outcome.started) / steps / 1e3 for outcome in outcomes
        ]
    deciles = statistics.quantiles(durations, n=10)
    return Timing(statistics.median(rounds), deciles[0], deciles[4], deciles[8])


def weight_bytes(case: ChainCase) -> tuple[float, float]:
    """Matrices of a layer, and of the head."""
    shape, of_weight = case.shape, case.format.blocks.block_bytes / (TILE * BLOCK)
    attended = shape.heads * shape.head_size
    projected = 2 * attended + 2 * shape.key_value_heads * shape.head_size
    layer = shape.hidden * (projected + 3 * shape.intermediate)
    return of_weight * layer, of_weight * shape.hidden * shape.vocabulary


def measure_copy() -> float:
    """Bytes read and written a second by copies on the device."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(COPIES):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    seconds = float(start.elapsed_time(end)) / 1e3
    return 2 * COPIED_BYTES * COPIES / seconds


def describe_host(compiler: Compiler) -> dict[str, str]:
    """The card, and versions of what the figures depend on."""
    gpu = find_gpu()
    return {
        "card": torch.cuda.get_device_name(),
        "driver": gpu.driver if gpu else "unknown",
        "nvrtc": compiler.version,
        "torch": torch.__version__,
    }


def markdown(result: CaseResult) -> str:
    """One case for people: checks that failed, and a table."""
    lines = [f"\n## {result.name}\n"]
    if result.checks:
        passed = sum(check.passed for check in result.checks)
        lines.append(f"{passed} of {len(result.checks)} checks passed.")
    failed = [check for check in result.checks if not check.passed]
    lines += [f"- FAILED: {check.name} {check.detail}".rstrip() for check in failed]
    if result.unsupported:
        lines.append(f"Not run on this card: {result.unsupported}.")
    if result.measurements:
        lines += [
            "",
            "| rows | layers | steps | µs without head | with head | p10, p50, p90 | floor"
            " | share |",
        ]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        lines += [_table_row(measurement) for measurement in result.measurements]
    if result.fills:
        fills = ", ".join(f"{depth}: {median:.0f} µs" for depth, median in result.fills.items())
        lines.append(f"\nA step that exits after so many layers and fills the others: {fills}.")
    if result.drafts:
        drafts = ", ".join(f"{count}: {median:.0f} µs" for count, median in result.drafts.items())
        lines.append(
            f"\nA position taken in, and so many tokens drafted, for so many sequences: {drafts}."
        )
    if result.prefills:
        each = (f"{count}: {median:.0f} µs" for count, median in result.prefills.items())
        lines.append(f"\nPrefill of so many tokens: {', '.join(each)}.")
    if result.batches:
        each = (f"{count}: {median:.0f} µs" for count, median in result.batches.items())
        lines.append(f"A batch of so many sequences, each behind {BEHIND}: {', '.join(each)}.")
    if result.positions:
        first, last = (timing.median for timing in result.positions.values())
        lines.append(
            f"\nPosition {POSITIONS[0]} of {LONG_CAPACITY}: {first:.0f} µs, position"
            f" {POSITIONS[1]}: {last:.0f} µs, {last / first:.2f}x."
        )
    if result.longest:
        median = result.longest.median
        lines.append(f"Position {LONGEST_CAPACITY - 1} of {LONGEST_CAPACITY}: {median:.0f} µs.")
    return "\n".join(lines)


def _table_row(measurement: Measurement) -> str:
    whole = measurement.with_head
    floor = measurement.layers_floor + measurement.head_floor
    percentiles = f"{whole.device_p10:.0f}, {whole.device_p50:.0f}, {whole.device_p90:.0f}"
    return (
        f"| {measurement.rows} | {measurement.layers} | {measurement.steps}"
        f" | {measurement.without_head.median:.0f}"
        f" | {whole.median:.0f} | {percentiles} | {floor:.0f} | {floor / whole.median:.0%} |"
    )


def run_cases(
    cases: list[ChainCase], compiler: Compiler, architecture: str, copy_rate: float
) -> Iterator[CaseResult]:
    """One result after another."""
    # all of them are compiled before figures are taken
    with ThreadPoolExecutor() as pool:
        compiling = [pool.submit(compile_chain, compiler, case, architecture) for case in cases]
    for case, compiled in zip(cases, compiling, strict=True):
        yield run_case(case, compiled, copy_rate)
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(MODEL_NAMES)
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--weights", choices=FORMATS, default="fp16", help="default: fp16")
    parser.add_argument("--architecture", metavar="NAME", help="default: the card's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no NVIDIA GPU")
    chosen = [TINY, TINY_GEMMA, *(case for case in MODELS if case.name in arguments.shapes)]
    cases = [dataclasses.replace(case, weights=arguments.weights) for case in chosen]
    try:
        compiler, architecture = Compiler(), arguments.architecture or card_architecture()
    except SedacError as error:
        parser.error(str(error))
    host = describe_host(compiler) | {
        "architecture": architecture,
        "weights": arguments.weights,
    }
    copy_rate, results = measure_copy(), []
    if not arguments.json:
        versions = ", ".join(f"{name} {value}" for name, value in host.items())
        print(f"{versions}; copies at {copy_rate / 1e12:.2f} TB/s")
    for result in run_cases(cases, compiler, architecture, copy_rate):
        results.append(result)
        if not arguments.json:
            print(markdown(result), flush=True)
    if arguments.json:
        report = {"host": host, "copy_bytes_per_second": copy_rate}
        print(json.dumps(report | {"results": [dataclasses.asdict(result) for result in results]}))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Checks of the chain's kernel: against PyTorch in fp32, and of its passes against each other.

A token's numbers must be the same bits in whatever pass it is computed, so most of the checks allow
no difference at all.
"""

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from chain_exit_checks import ExitChecks
from chain_fill_checks import FillChecks
from chain_launcher import ChainLauncher, SequenceInput
from kernel_check import TOKENS, TOLERANCE, KernelCheck, relative_error
from torch import Tensor

from sedac_export.cuda.chain_abi import MARGIN_BINS, MAX_ROWS, RowRace

MARGIN_TOLERANCE = 1e-4

PASSES = (1, 2, 3, 5, 8)
REPETITIONS = 100
TEMPERATURES = (0.3, 0.8, 1.0, 1.7)
RACES = 5  # passes at each temperature
MIN_CERTAIN = 0.95


class ChainChecks:
    """Every check of one launcher.

    Needs a vocabulary of more than 160 tokens and at least 6 layers, so that exits may come after a
    third of them and after a sixth.
    """

    def __init__(self, launcher: ChainLauncher) -> None:
        self._launcher, self._position = launcher, launcher.decoder.case.position
        self._layers = launcher.decoder.shape.layers
        self._exit = self._layers // 3
        self._bits = torch.empty(0)  # logits of TOKENS in one pass

    def run(self) -> Iterator[KernelCheck]:
        """One check after another."""
        with torch.no_grad():
            yield from self._agreement_with_pytorch()
            yield from self._margins()
            yield from self._races()
            yield self._tokens_one_by_one()
            yield self._sequences_together()
            yield from self._exits()
            yield self._deferred_rows()
            yield self._completion_alone()
            yield self._gap_between_sequences()
            yield from ExitChecks(self._launcher).run()
            yield from FillChecks(self._launcher).run()
            yield from self._steps()
            yield self._repetitions()

    def _agreement_with_pytorch(self) -> Iterator[KernelCheck]:
        logits = {}
        for count in PASSES:
            history = self._launcher.fill(0, self._position)
            wanted = self._launcher.decoder.compute(history, TOKENS[:count]).logits
            logits[count] = self._launcher.run([self._sequence(TOKENS[:count])])
            error = relative_error(logits[count], wanted)
            detail = f"relative error {error:.1e}"
            yield KernelCheck(f"logits, {count} rows", error < TOLERANCE, detail)
            yield KernelCheck(f"outcome, {count} rows", self._outcome_is_of(logits[count]))
        self._bits = logits[PASSES[-1]]
        same = all(torch.equal(rows, self._bits[: len(rows)]) for rows in logits.values())
        yield KernelCheck("the same bits in passes of 1, 2, 3, 5 and 8 rows", same)

    def _outcome_is_of(self, logits: Tensor) -> bool:
        outcome = self._launcher.outcome()
        rows = outcome.row[: len(logits)]
        return (
            [row.token for row in rows] == logits.argmax(-1).tolist()
            and all(row.finite for row in rows)
            and outcome.sequence[0].depth == self._layers
        )

    def _margins(self) -> Iterator[KernelCheck]:
        """After the pass of all rows."""
        first, second = self._bits.softmax(-1).topk(2).values.unbind(-1)
        rows = self._launcher.outcome().row
        margins = torch.tensor([row.margin for row in rows], device=first.device)
        error = (margins - (first - second)).abs().max().item()
        yield KernelCheck("margins", error < MARGIN_TOLERANCE, f"error {error:.1e}")

    def _races(self) -> Iterator[KernelCheck]:
        """Against the sampler's own arithmetic on the logits, which are those without races."""
        wins = certain = drawn = 0
        same, worst = True, 0.0
        for temperature in TEMPERATURES:
            for first in range(RACES):
                keys = [_key(first * len(TOKENS) + row) for row in range(len(TOKENS))]
                self._launcher.fill(0, self._position)
                races = [RowRace(key, 1 / temperature) for key in keys]
                logits = self._launcher.run([self._sequence(TOKENS)], races=races)
                same = same and torch.equal(logits, self._bits)
                outcomes = self._launcher.outcome().race[: len(keys)]
                for key, row, outcome in zip(keys, logits.cpu().numpy(), outcomes, strict=True):
                    right = outcome.token == race_winner(row, temperature, key)
                    right = right and outcome.logit == row[outcome.token]
                    certain += outcome.is_certain
                    wins += bool(right and outcome.is_certain)
                    total = np.exp(row.astype(np.float64) - row.max()).sum()
                    worst = max(worst, abs(outcome.total / float(total) - 1))
                drawn += len(keys)
        yield KernelCheck("the same bits where tokens are sampled", same)
        yield KernelCheck(
            "sampled tokens", wins == certain, f"{wins} of {certain} are the sampler's"
        )
        passed = certain >= MIN_CERTAIN * drawn
        yield KernelCheck("races that are certain", passed, f"{certain} of {drawn}")
        yield KernelCheck("sums of weights", worst < MARGIN_TOLERANCE, f"error {worst:.1e}")

    def _tokens_one_by_one(self) -> KernelCheck:
        self._launcher.fill(0, self._position)
        rows = [
            self._launcher.run([self._sequence([token], self._position + index)])
            for index, token in enumerate(TOKENS)
        ]
        return KernelCheck("one by one as in one pass", torch.equal(torch.cat(rows), self._bits))

    def _sequences_together(self) -> KernelCheck:
        positions, counts = (self._position, 37, 200, 5), (2, 1, 3, 2)
        sequences = [
            self._sequence([token + slot for token in TOKENS[:count]], position, slot=slot)
            for slot, (position, count) in enumerate(zip(positions, counts, strict=True))
        ]

        def run(chosen: Sequence[SequenceInput]) -> Tensor:
            for slot, position in enumerate(positions):
                self._launcher.fill(slot, position, seed=slot + 1)
            return self._launcher.run(chosen)

        alone = torch.cat([run([sequence]) for sequence in sequences])
        return KernelCheck("several sequences as alone", torch.equal(run(sequences), alone))

    def _exits(self) -> Iterator[KernelCheck]:
        history = self._launcher.fill(0, self._position)
        wanted = self._launcher.decoder.compute(history, TOKENS[:1], self._exit)
        logits = self._launcher.run([self._sequence(TOKENS[:1], max_depth=self._exit)])
        sequence = self._launcher.outcome().sequence[0]
        depth = (sequence.depth, sequence.criterion) == (self._exit, -1)
        yield KernelCheck(f"exit after {self._exit} layers", depth, f"depth {sequence.depth}")
        error = relative_error(logits, wanted.logits)
        yield KernelCheck("logits at an exit", error < TOLERANCE, f"relative error {error:.1e}")
        saved = self._launcher.saved[0, self._position]
        error = relative_error(saved, wanted.hidden[0])
        yield KernelCheck(
            "hidden state at an exit", error < TOLERANCE, f"relative error {error:.1e}"
        )

    def _deferred_rows(self) -> KernelCheck:
        self._exit_early(1)
        logits = self._launcher.run([self._after_exit()])
        return KernelCheck("deferred row with the next token", torch.equal(logits, self._bits[:2]))

    def _completion_alone(self) -> KernelCheck:
        self._exit_early(1)
        deeper = 2 * self._exit
        self._launcher.run([self._after_exit(max_depth=deeper)])
        rows = [(-1, self._position + index, deeper) for index in range(2)]
        logits = self._launcher.run([SequenceInput(rows)])
        return KernelCheck("completion alone", torch.equal(logits, self._bits[:2]))

    def _gap_between_sequences(self) -> KernelCheck:
        """One starts deeper than the other ends: layers between have no rows."""
        self._exit_early(1)
        self._launcher.fill(1, 37, seed=2)
        late = SequenceInput([(-1, self._position, self._exit)])
        early = self._sequence([9], 37, slot=1, max_depth=self._exit // 2)
        logits = self._launcher.run([late, early])
        depth = self._launcher.outcome().sequence[1].depth
        passed = torch.equal(logits[0], self._bits[0]) and depth == self._exit // 2
        return KernelCheck("a gap between sequences", passed, f"depth {depth}")

    def _steps(self) -> Iterator[KernelCheck]:
        """Passes that go on with the tokens they chose, against passes of one step."""
        for count in (1, 2, 4):
            for depth in (self._layers, self._exit, self._exit + 1):
                for temperature in (0.0, 1.0):
                    yield self._steps_as_passes(count, depth, temperature)
        yield self._end_of_chunk()
        yield self._end_of_draft()

    def _steps_as_passes(self, count: int, depth: int, temperature: float) -> KernelCheck:
        """`count` sequences of a row each, to `depth` layers."""
        starts, steps = (129, 37, 200, 5), MAX_ROWS // count
        keys = [_key(index) for index in range(steps * count)] if temperature else []
        races = [RowRace(key, 1 / temperature) for key in keys]

        def sequences(step: int, tokens: Sequence[int]) -> list[SequenceInput]:
            chosen = enumerate(zip(starts[:count], tokens, strict=True))
            return [
                self._sequence([token], start + step, slot, depth)
                for slot, (start, token) in chosen
            ]

        def fill() -> None:
            for slot, start in enumerate(starts[:count]):
                self._launcher.fill(slot, start, seed=slot + 1)

        fill()
        tokens, rows = list(TOKENS[:count]), []
        for step in range(steps):
            its_races = races[step * count : (step + 1) * count]
            rows.append(self._launcher.run(sequences(step, tokens), races=its_races))
            outcome = self._launcher.outcome()
            tokens = [(outcome.race if races else outcome.row)[row].token for row in range(count)]
        fill()
        wanted = self._launcher.make_pass(sequences(0, TOKENS[:count]), races=races, steps=steps)
        logits, outcome = self._launcher.run_pass(wanted), self._launcher.outcome()
        depths = {sequence.depth for sequence in outcome.sequence[: steps * count]}
        same = torch.equal(logits, torch.cat(rows)) and outcome.steps == steps
        chosen = "sampled" if temperature else "most probable"
        name = f"{steps} steps of {count} rows, {depth} layers, {chosen} tokens"
        return KernelCheck(name, same and depths == {depth}, f"{outcome.steps} steps")

    def _end_of_chunk(self) -> KernelCheck:
        """A position that begins a chunk of attention takes a pass of its own."""
        self._launcher.fill(0, 125)
        wanted = self._launcher.make_pass([self._sequence(TOKENS[:1], 125)], steps=MAX_ROWS)
        self._launcher.run_pass(wanted)
        steps = self._launcher.outcome().steps
        return KernelCheck("steps end where a chunk begins", steps == 3, f"{steps} steps")

    def _end_of_draft(self) -> KernelCheck:
        """Steps go on while the product of the tokens' acceptance rates is large enough."""
        self._launcher.fill(0, 129)
        wanted = self._launcher.make_pass([self._sequence(TOKENS[:1], 129)], steps=MAX_ROWS)
        wanted.acceptance = (ctypes.c_float * MARGIN_BINS)(*[0.5] * MARGIN_BINS)
        wanted.min_accepted = (ctypes.c_float * MAX_ROWS)(*[0.125] * MAX_ROWS)
        self._launcher.run_pass(wanted)
        steps = self._launcher.outcome().steps
        return KernelCheck("steps end where a draft does", steps == 4, f"{steps} steps")

    def _repetitions(self) -> KernelCheck:
        self._launcher.fill(0, self._position)
        same = 0
        counts = (1, 2, 4, 8)
        for count in counts:
            for _ in range(REPETITIONS):
                logits = self._launcher.run([self._sequence(TOKENS[:count])])
                same += torch.equal(logits, self._bits[:count])
        runs = REPETITIONS * len(counts)
        return KernelCheck(f"the same bits in {runs} runs", same == runs, f"{same} runs")

    def _sequence(
        self,
        tokens: Sequence[int],
        position: int | None = None,
        slot: int = 0,
        max_depth: int | None = None,
    ) -> SequenceInput:
        first = self._position if position is None else position
        return SequenceInput.of_tokens(tokens, first, slot, max_depth)

    def _exit_early(self, count: int) -> None:
        self._launcher.fill(0, self._position)
        self._launcher.run([self._sequence(TOKENS[:count], max_depth=self._exit)])

    def _after_exit(self, max_depth: int | None = None) -> SequenceInput:
        """The token that exited, from where it did, and the next one."""
        rows = [(-1, self._position, self._exit), (TOKENS[1], self._position + 1, 0)]
        return SequenceInput(rows, max_depth=max_depth)


def race_winner(logits: npt.NDArray[np.float32], temperature: float, key: int) -> int:
    """The token that sedac-core/src/sampler/race.rs chooses without filters."""
    z = np.uint64(key) + np.arange(len(logits), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    uniform = ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    weights = np.exp((logits - logits.max()) / np.float32(temperature))
    with np.errstate(divide="ignore"):
        return int((-np.log(uniform) / weights.astype(np.float64)).argmin())


def _key(number: int) -> int:
    """A key of 64 random bits."""
    return int(np.random.default_rng(number).integers(1 << 64, dtype=np.uint64))

"""Checks of exits that the chain's kernel decides: by stability, entropy probes and exit heads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from chain_launcher import ChainLauncher, SequenceInput
from kernel_check import TOKENS, TOLERANCE, KernelCheck, relative_error
from torch import Tensor

from sedac_export.cuda.chain_abi import MAX_ROWS, Condition, SequenceOutcome

STABILITY_TOLERANCE = 1e-3
RUN_LENGTH = 2
# as Condition.signal has them
STABILITY, RISK, MARGIN, LEARNED = 1, 2, 3, 4
AT_LEAST, BELOW, ACCUMULATED = 0, 1, 2
# random logits are some 8 apart, so that what fp16 changes of them shows in margin and entropy
TOLERANCES = {RISK: 1e-2, MARGIN: 5e-2, LEARNED: 1e-2}
ENTROPY_TOLERANCE = 5e-2
# rows of another sequence in the pass, and whether the rule decides about it too
COMPANY = ((0, False), (3, False), (7, False), (1, True))
# of the vocabulary, the share that exit heads know
FREQUENT = 8


@dataclass(frozen=True)
class Reference:
    """Of the first token, by layer in PyTorch: hidden states [1, hidden], and stabilities."""

    hidden: list[Tensor]
    stabilities: list[float]

    def last_stabilities(self, depth: int) -> Tensor:
        """Of the last three layers [1, 3], 0 where there are fewer."""
        known = [0.0, 0.0, *self.stabilities[:depth]]
        return torch.tensor([known[-3:]], device=self.hidden[0].device)


class ExitChecks:
    """The checks of one launcher's exits. Needs what ChainChecks needs."""

    def __init__(self, launcher: ChainLauncher) -> None:
        self._launcher, self._decoder = launcher, launcher.decoder
        self._layers = launcher.decoder.shape.layers
        self._position = launcher.decoder.case.position
        vocabulary = launcher.decoder.shape.vocabulary
        self._tokens = torch.arange(3, vocabulary, FREQUENT, device="cuda")

    def run(self) -> Iterator[KernelCheck]:
        """One check after another."""
        reference = self._reference()
        yield from self._stability_exits(reference)
        yield from self._risk_exits(reference)
        self._launcher.hold_frequent_tokens(self._tokens)
        for lenses in (False, True):
            yield from self._head_exits(reference, lenses)
        yield from self._logits_through_lenses(reference)
        for lenses in (True, False):
            if not lenses:
                self._launcher.forget_exits()
            yield from self._exits_before_waiting_rows(lenses)
        self._launcher.forget_exits()

    def _reference(self) -> Reference:
        history = self._launcher.fill(0, self._position)
        depths = range(1, self._layers + 1)
        computed = [self._decoder.compute(history, TOKENS[:1], depth) for depth in depths]
        stabilities = computed[-1].stabilities[:, 0].tolist()
        return Reference([each.hidden for each in computed], stabilities)

    def _stability_exits(self, reference: Reference) -> Iterator[KernelCheck]:
        threshold, wanted = stability_threshold(reference.stabilities)
        condition = exit_condition(STABILITY, AT_LEAST, threshold, RUN_LENGTH)
        found = []
        for others, both in COMPANY:
            logits, stops = self._run_rule([condition] * self._layers, others, both)
            error = abs(stops[0].stability - reference.stabilities[wanted - 1])
            detail = f"depth {stops[0].depth} of {wanted}, stability's error {error:.1e}"
            stopped = (stops[0].criterion, stops[0].depth) == (0, wanted)
            alone = both or all(stop.depth == self._layers for stop in stops[1:])
            passed = stopped and alone and error < STABILITY_TOLERANCE
            yield KernelCheck(f"stability exit {_beside(others, both)}", passed, detail)
            found.append(logits)
        same = all(torch.equal(logits, found[0]) for logits in found)
        yield KernelCheck("the same bits at stability exits", same)

    def _risk_exits(self, reference: Reference) -> Iterator[KernelCheck]:
        """Probes after some layers only; the deepest of them says stop."""
        risks = {}
        for depth in self._probed():
            self._launcher.hold_exit(depth, "probe", self._decoder.probe(depth).values())
            risks[depth] = self._decoder.risk(depth, reference.hidden[depth - 1]).item()
        yield from self._signal_exits("risk", RISK, risks)

    def _head_exits(self, reference: Reference, lenses: bool) -> Iterator[KernelCheck]:
        """Exit heads there instead, also through lenses."""
        margins, learned = {}, {}
        entropies = {}
        for depth in self._probed():
            self._launcher.hold_exit_head(depth)
            hidden = reference.hidden[depth - 1]
            if lenses:
                self._launcher.hold_exit(depth, "lens", self._decoder.lens(depth).values())
                hidden = self._decoder.through_lens(depth, hidden)
            last = reference.last_stabilities(depth)
            signals = self._decoder.exit_signals(depth, hidden, self._tokens, last)
            margins[depth], learned[depth], entropies[depth] = signals[0].tolist()
        name = " through lenses" * lenses
        yield from self._signal_exits(f"margin{name}", MARGIN, margins, entropies)
        yield from self._signal_exits(f"learned{name}", LEARNED, learned, entropies)

    def _signal_exits(
        self,
        name: str,
        signal: int,
        values: dict[int, float],
        entropies: dict[int, float] | None = None,
    ) -> Iterator[KernelCheck]:
        """The deepest of the depths that `values` are of says stop, in whatever company."""
        deepest, tolerance = max(values), TOLERANCES[signal]
        rule = [Condition() for _ in range(self._layers)]
        comparison, side = (BELOW, 1) if signal == RISK else (AT_LEAST, -1)
        for depth, value in values.items():
            bound = value + side * tolerance * (1 if depth == deepest else -1)
            rule[depth - 1] = exit_condition(signal, comparison, bound)
        found = []
        for others, both in COMPANY:
            logits, (stop, *_) = self._run_rule(rule, others, both)
            measured = {RISK: stop.risk, MARGIN: stop.margin, LEARNED: stop.learned}[signal]
            error = abs(measured - values[deepest])
            detail = f"depth {stop.depth} of {deepest}, error {error:.1e}"
            passed = (stop.depth, stop.criterion) == (deepest, 0) and error < tolerance
            if entropies is not None:
                error = abs(stop.entropy - entropies[deepest])
                detail += f", entropy's {error:.1e}"
                passed = passed and error < ENTROPY_TOLERANCE
            yield KernelCheck(f"{name} exit {_beside(others, both)}", passed, detail)
            found.append((logits, measured))
        same = all(torch.equal(each, found[0][0]) and m == found[0][1] for each, m in found)
        yield KernelCheck(f"the same bits at {name} exits", same)

    def _logits_through_lenses(self, reference: Reference) -> Iterator[KernelCheck]:
        """Where the depth stops tokens, not a rule that reads the exit head there."""
        depth = max(self._probed())
        wanted = self._decoder.head(self._decoder.through_lens(depth, reference.hidden[depth - 1]))
        limited = self._sequence(TOKENS[:1], self._position, max_depth=depth)
        logits = self._run([limited])
        error = relative_error(logits, wanted)
        detail = f"relative error {error:.1e}"
        yield KernelCheck("logits through a lens", error < TOLERANCE, detail)
        rows = self._run([self._sequence(TOKENS, self._position, max_depth=depth)])
        one_by_one = torch.cat([logits, *self._following(TOKENS[1:], depth)])
        yield KernelCheck("rows through a lens one by one", torch.equal(rows, one_by_one))
        yield self._steps_through_a_lens(depth)

    def _following(self, tokens: Sequence[int], depth: int) -> Iterator[Tensor]:
        """Logits of tokens after the first one, each in a pass of its own."""
        self._run([self._sequence(TOKENS[:1], self._position, max_depth=depth)])
        for position, token in enumerate(tokens, self._position + 1):
            yield self._launcher.run([self._sequence([token], position, max_depth=depth)])

    def _steps_through_a_lens(self, depth: int) -> KernelCheck:
        self._launcher.fill(0, 129)
        wanted = self._launcher.make_pass(
            [self._sequence(TOKENS[:1], 129, max_depth=depth)], steps=MAX_ROWS
        )
        logits = self._launcher.run_pass(wanted)
        rows, token = [], TOKENS[0]
        self._launcher.fill(0, 129)
        for step in range(MAX_ROWS):
            rows.append(self._launcher.run([self._sequence([token], 129 + step, max_depth=depth)]))
            token = int(rows[-1].argmax())
        return KernelCheck("steps through a lens", torch.equal(logits, torch.cat(rows)))

    def _exits_before_waiting_rows(self, lenses: bool) -> Iterator[KernelCheck]:
        """A rule stops the newest token before the layer at which a row waits that wants logits."""
        waiting = self._layers // 3
        first = self._sequence(TOKENS[:1], self._position, max_depth=waiting)
        for depth in range(1, waiting + 1):
            rule = [Condition() for _ in range(self._layers)]
            rule[depth - 1] = exit_condition(STABILITY, AT_LEAST, -1.0)
            rows = [(-1, self._position, waiting), (TOKENS[1], self._position + 1, 0)]
            self._run([first])
            logits = self._launcher.run([SequenceInput(rows, conditions=rule)])[1:]
            stop = self._launcher.outcome().sequence[0].depth
            self._run([first])
            newest = self._sequence(TOKENS[1:2], self._position + 1, max_depth=depth)
            same = torch.equal(logits, self._launcher.run([newest]))
            name = f"an exit after {depth} layers where a row waits{' with lenses' * lenses}"
            yield KernelCheck(name, same and stop == depth, f"depth {stop}")

    def _run_rule(
        self, rule: list[Condition], others: int, both: bool
    ) -> tuple[Tensor, list[SequenceOutcome]]:
        """The first token's logits, and where it and another sequence of `others` rows stop.

        both: the rule decides about the other sequence too.
        """
        self._launcher.fill(1, 37, seed=5)
        sequences = [self._sequence(TOKENS[:1], self._position, conditions=rule)]
        if others:
            theirs = rule if both else ()
            rows = range(3, 3 + others)
            sequences.append(self._sequence(rows, 37, slot=1, conditions=theirs))
        logits = self._run(sequences)[0]
        outcome = self._launcher.outcome()
        return logits, [
            SequenceOutcome.from_buffer_copy(outcome.sequence[i]) for i in range(len(sequences))
        ]

    def _run(self, sequences: Sequence[SequenceInput]) -> Tensor:
        self._launcher.fill(0, self._position)
        return self._launcher.run(sequences)

    _sequence = staticmethod(SequenceInput.of_tokens)

    def _probed(self) -> list[int]:
        return [depth for depth in range(1, self._layers) if depth % 3]


def _beside(others: int, both: bool) -> str:
    return f"beside {others} rows" + " with the same rule" * both


def stability_threshold(stabilities: list[float]) -> tuple[float, int]:
    """A threshold at which the token exits before its last layer, and after how many.

    It lies in the widest gap between two layers' stabilities, so that rounding does not matter.
    """
    ordered = sorted(stabilities)
    gaps = sorted(pairwise(ordered), key=lambda gap: gap[0] - gap[1])
    for below, above in gaps:
        threshold = (below + above) / 2
        depth = _first_run(stabilities, threshold)
        if depth < len(stabilities):
            return threshold, depth
    raise AssertionError(f"no threshold makes an exit of {stabilities}")


def _first_run(stabilities: list[float], threshold: float) -> int:
    """Layers after which RUN_LENGTH in a row have reached the threshold, all where none have."""
    run = 0
    for depth, stability in enumerate(stabilities, 1):
        run = run + 1 if stability >= threshold else 0
        if run == RUN_LENGTH:
            return depth
    return len(stabilities)


def exit_condition(
    signal: int, comparison: int, threshold: float, run_length: int = 1
) -> Condition:
    """One that may exit."""
    return Condition(
        signal=signal,
        comparison=comparison,
        threshold=threshold,
        run_length=run_length,
        may_exit=1,
    )

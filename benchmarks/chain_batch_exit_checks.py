"""Checks of exits in batches: rows exit where passes do, with the same logits and caches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from chain_exit_checks import ACCUMULATED, AT_LEAST, BELOW, RISK, STABILITY, exit_condition
from chain_launcher import ChainLauncher, SequenceInput
from kernel_check import KernelCheck
from torch import Tensor

from sedac_export.cuda.chain_abi import BatchRow, Condition, RowRule, SequenceOutcome

Rule = Sequence[Condition]
# rows beside those about which rules decide, so that there are few or many
COMPANY = (0, 70)


@dataclass(frozen=True)
class Exiting:
    """A token of the sequence in a slot, about which a rule decides."""

    slot: int
    token: int
    position: int
    rule: Rule


@dataclass(frozen=True)
class Found:
    """What is left of each: its exit (depth, criterion), and logits; and all caches."""

    exits: list[tuple[int, int]]
    logits: Tensor
    caches: list[Tensor]


class BatchExitChecks:
    """Those of one launcher with four slots."""

    def __init__(self, launcher: ChainLauncher) -> None:
        self._launcher, self._decoder = launcher, launcher.decoder
        self._layers = launcher.decoder.shape.layers
        position = launcher.decoder.case.position
        self._positions = (position - 3, 0, position // 2)

    def run(self) -> Iterator[KernelCheck]:
        """By each signal, with thresholds that it just reaches or misses; and by other rules."""
        for depth in range(1, self._layers):
            self._launcher.hold_exit(depth, "probe", self._decoder.probe(depth).values())
        rules = {
            "stability": [self._sharp_rule(slot, STABILITY) for slot in range(3)],
            "risk": [self._sharp_rule(slot, RISK) for slot in range(3)],
            "a run": [self._run_rule(1 + slot * self._layers // 3) for slot in range(3)],
            "accumulated risk": [self._accumulated_rule()] * 3,
            "the second criterion": [[*self._never(), *self._run_rule(2)]] * 3,
        }
        for name, of_slots in rules.items():
            for company in COMPANY:
                for fills in (False, True):
                    yield self._check(name, of_slots, company, fills)
        self._launcher.forget_exits()

    def _sharp_rule(self, slot: int, signal: int) -> Rule:
        """Exits where the signal is at least what passes measure; the second slot's just misses."""
        depth = 1 + slot * (self._layers - 1) // 3
        stop = self._measure(slot, depth, signal)
        value = torch.tensor(stop.stability if signal == STABILITY else stop.risk)
        above = torch.nextafter(value, torch.tensor(math.inf))
        misses = slot == 1
        rule = [Condition() for _ in range(self._layers)]
        if signal == STABILITY:
            threshold = above if misses else value
            rule[depth - 1] = exit_condition(STABILITY, AT_LEAST, threshold.item())
        else:
            threshold = value if misses else above
            rule[depth - 1] = exit_condition(RISK, BELOW, threshold.item())
        return rule

    def _run_rule(self, depth: int) -> Rule:
        """Exits at `depth`, as the last of so many."""
        return [exit_condition(STABILITY, AT_LEAST, -1.0, depth)] * self._layers

    def _accumulated_rule(self) -> Rule:
        """Exits where what risks are below 2 adds up to 1.5: some layers after the first."""
        accumulated = exit_condition(RISK, ACCUMULATED, 2.0)
        accumulated.decay, accumulated.weight, accumulated.target = 1.0, 1.0, 1.5
        return [accumulated] * self._layers

    def _never(self) -> Rule:
        return [exit_condition(STABILITY, AT_LEAST, math.inf)] * self._layers

    def _measure(self, slot: int, depth: int, signal: int) -> SequenceOutcome:
        never = exit_condition(signal, AT_LEAST, math.inf)
        rule = [Condition() for _ in range(self._layers)]
        rule[depth - 1] = never
        self._fill(slot)
        token, position = self._token(slot), self._positions[slot]
        self._launcher.run([SequenceInput.of_tokens([token], position, slot, depth, rule)])
        return SequenceOutcome.from_buffer_copy(self._launcher.outcome().sequence[0])

    def _check(self, name: str, rules: list[Rule], company: int, fills: bool) -> KernelCheck:
        exiting = [
            Exiting(slot, self._token(slot), self._positions[slot], rule)
            for slot, rule in enumerate(rules)
        ]
        passes = self._by_passes(exiting, company, fills)
        batch = self._by_batch(exiting, company, fills)
        pairs = zip((passes.logits, *passes.caches), (batch.logits, *batch.caches), strict=True)
        different = sum(int((a != b).sum()) for a, b in pairs)
        missed = name in ("stability", "risk")
        stopped = [depth < self._layers for depth, _ in passes.exits]
        as_meant = stopped == [True, not missed, True]
        what = f"exits by {name} in a batch beside {company} rows{', filled' * fills}, as passes"
        detail = f"exits {batch.exits} of {passes.exits}, {different} numbers differ"
        passed = as_meant and batch.exits == passes.exits and different == 0
        return KernelCheck(what, passed, detail)

    def _by_passes(self, exiting: list[Exiting], company: int, fills: bool) -> Found:
        launcher, exits, logits = self._launcher, [], []
        self._fill_all()
        for of in exiting:
            row = SequenceInput([(of.token, of.position, 0)], of.slot, None, of.rule, fills)
            logits.append(launcher.run([row]))
            stop = launcher.outcome().sequence[0]
            exits.append((stop.depth, stop.criterion))
            if stop.depth < self._layers and not fills:
                waiting = [(-1, of.position, stop.depth)]
                launcher.run([SequenceInput(waiting, of.slot)], logits_rows=0)
        for row in self._company(company):
            launcher.run([SequenceInput.of_tokens([row.token], row.position, row.slot)], 0)
        return Found(exits, torch.cat(logits), self._caches())

    def _by_batch(self, exiting: list[Exiting], company: int, fills: bool) -> Found:
        launcher = self._launcher
        self._fill_all()
        rows = [BatchRow(of.token, of.position, of.slot) for of in exiting]
        rules: dict[int, RowRule] = {
            index: launcher.rule(of.rule, freezes=fills) for index, of in enumerate(exiting)
        }
        wanted = launcher.make_batch(rows + self._company(company), range(len(rows)), rules=rules)
        logits = launcher.run_batch(wanted)
        outcome = launcher.batch_outcome()
        exits = [(exit.depth, exit.criterion) for exit in outcome.exit[: len(rows)]]
        return Found(exits, logits, self._caches())

    def _company(self, rows: int) -> list[BatchRow]:
        vocabulary = self._decoder.shape.vocabulary
        return [BatchRow(7 * index % vocabulary, index, 3) for index in range(rows)]

    def _token(self, slot: int) -> int:
        return (3, 17, 29)[slot]

    def _fill(self, slot: int) -> None:
        self._launcher.fill(slot, self._positions[slot], seed=slot + 1)

    def _fill_all(self) -> None:
        for slot in range(3):
            self._fill(slot)
        self._launcher.fill(3, 0)

    def _caches(self) -> list[Tensor]:
        caches = (*self._launcher.keys, *self._launcher.values)
        return [cache.clone() for cache in caches]

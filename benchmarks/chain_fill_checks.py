"""Checks of exits that fill the caches of the layers which they skip, and go on by themselves."""

from collections.abc import Iterator, Sequence

import torch
from chain_exit_checks import (
    AT_LEAST,
    BELOW,
    FREQUENT,
    MARGIN,
    RISK,
    STABILITY,
    exit_condition,
)
from chain_launcher import ChainLauncher, SequenceInput
from kernel_check import TOKENS, TOLERANCE, KernelCheck, relative_error
from torch import Tensor

from sedac_export.cuda.chain_abi import MAX_ROWS, Condition, RowRace, SequenceOutcome

SIGNALS = {"stability": STABILITY, "risk": RISK, "margin": MARGIN}
# where sequences begin that go on together
STARTS = (129, 37, 200, 5)
# random logits are some 8 apart: tokens so sampled differ
TEMPERATURE = 20.0


class FillChecks:
    """Those of one launcher. Needs what ChainChecks needs."""

    def __init__(self, launcher: ChainLauncher) -> None:
        self._launcher, self._decoder = launcher, launcher.decoder
        self._layers = launcher.decoder.shape.layers
        self._position = launcher.decoder.case.position
        self._exit = self._layers // 3

    def run(self) -> Iterator[KernelCheck]:
        """One check after another."""
        yield from self._agreement_with_pytorch()
        yield from self._in_company()
        yield self._without_logits()
        yield from self._steps()

    def _agreement_with_pytorch(self) -> Iterator[KernelCheck]:
        """Entries that PyTorch computes from the hidden state at the exit."""
        for depth in (1, self._exit, self._layers - 1):
            history = self._launcher.fill(0, self._position)
            self._launcher.run([self._exiting(TOKENS[:1], self._position, max_depth=depth)])
            hidden = self._decoder.compute(history, TOKENS[:1], depth).hidden
            errors = [
                relative_error(found[0, :, self._position].float(), wanted[:, 0])
                for layer in range(depth, self._layers)
                for found, wanted in self._entries(layer, hidden)
            ]
            detail = f"largest relative error {max(errors):.1e}"
            name = f"keys and values of layers skipped after {depth}"
            yield KernelCheck(name, max(errors) < TOLERANCE, detail)

    def _entries(self, layer: int, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The caches of a layer's keys and of its values, and what belongs to the position."""
        _, *wanted = self._decoder.project(self._decoder.layer(layer), hidden, self._position)
        found = self._launcher.keys[layer], self._launcher.values[layer]
        return zip(found, wanted, strict=True)

    def _in_company(self) -> Iterator[KernelCheck]:
        """What an exit fills is the same beside others, which exit elsewhere, wait or go on."""
        exiting = self._exiting(TOKENS[:3], self._position)
        others = [
            self._exiting([9], 37, slot=1, max_depth=2 * self._exit),
            SequenceInput.of_tokens([11], 200, 2, self._exit),
            SequenceInput.of_tokens([12, 13], 5, 3),
        ]
        self._fill(self._position)
        for position, token in enumerate(TOKENS[:3], self._position):
            self._launcher.run([self._exiting([token], position)])
        for other in others:
            self._launcher.run([other])
        wanted = self._caches()
        groups = {
            "in one pass": [[exiting], *([other] for other in others)],
            "beside one": [[exiting, others[0]], others[1:]],
            "beside all": [[*others, exiting]],
        }
        for name, passes in groups.items():
            self._fill(self._position)
            for sequences in passes:
                self._launcher.run(sequences)
            same = all(map(torch.equal, self._caches(), wanted))
            yield KernelCheck(f"caches of skipped layers, {name}", same)

    def _without_logits(self) -> KernelCheck:
        caches = []
        for logits_rows in (1, 0):
            self._fill(self._position)
            self._launcher.run([self._exiting(TOKENS[:1], self._position)], logits_rows)
            caches.append(self._caches())
        same = all(map(torch.equal, *caches))
        return KernelCheck("caches of skipped layers without logits", same)

    def _steps(self) -> Iterator[KernelCheck]:
        """Passes that go on after exits, against passes of one step."""
        self._hold_probes()
        for name, signal in SIGNALS.items():
            rule = self._dividing_rule(signal)
            for count in (1, 2, 4):
                yield self._steps_as_passes(name, rule, count)
        for depth in self._probed():
            self._launcher.hold_exit(depth, "lens", self._decoder.lens(depth).values())
        rule = self._dividing_rule(MARGIN)
        for count in (1, 4):
            yield self._steps_as_passes("margin through a lens", rule, count)
        self._launcher.forget_exits()

    def _hold_probes(self) -> None:
        vocabulary = self._decoder.shape.vocabulary
        self._launcher.hold_frequent_tokens(torch.arange(3, vocabulary, FREQUENT, device="cuda"))
        for depth in self._probed():
            self._launcher.hold_exit(depth, "probe", self._decoder.probe(depth).values())
            self._launcher.hold_exit_head(depth)

    def _probed(self) -> tuple[int, int]:
        """Two depths with probes: an odd and an even number of layers."""
        return self._exit, self._exit + 1

    def _dividing_rule(self, signal: int) -> list[Condition]:
        """At each probed depth, some tokens exit and others do not."""
        rule = [Condition() for _ in range(self._layers)]
        for depth in self._probed():
            measured = sorted(self._measure(token, depth, signal) for token in TOKENS)
            middle = measured[len(measured) // 2]
            comparison = BELOW if signal == RISK else AT_LEAST
            rule[depth - 1] = exit_condition(signal, comparison, middle)
        return rule

    def _measure(self, token: int, depth: int, signal: int) -> float:
        rule = [Condition() for _ in range(self._layers)]
        rule[depth - 1] = exit_condition(signal, AT_LEAST, float("inf"))
        self._launcher.fill(0, STARTS[0], seed=1)
        self._launcher.run([SequenceInput.of_tokens([token], STARTS[0], 0, depth, rule)])
        stop = self._launcher.outcome().sequence[0]
        return float({STABILITY: stop.stability, RISK: stop.risk, MARGIN: stop.margin}[signal])

    def _steps_as_passes(self, name: str, rule: list[Condition], count: int) -> KernelCheck:
        """`count` sequences of a row each."""
        steps, tokens, rows, exits = MAX_ROWS // count, list(TOKENS[:count]), [], []
        races = [RowRace(7919 * index, 1 / TEMPERATURE) for index in range(MAX_ROWS)]
        self._fill(STARTS[0])
        for step in range(steps):
            its_races = races[step * count : (step + 1) * count]
            rows.append(self._launcher.run(self._newest(tokens, step, rule), races=its_races))
            outcome = self._launcher.outcome()
            exits += [_exit_of(stop) for stop in outcome.sequence[:count]]
            tokens = [race.token for race in outcome.race[:count]]
        caches = self._caches()
        self._fill(STARTS[0])
        first = self._newest(TOKENS[:count], 0, rule)
        wanted = self._launcher.make_pass(first, races=races, steps=steps)
        logits = self._launcher.run_pass(wanted)
        outcome = self._launcher.outcome()
        found = [_exit_of(stop) for stop in outcome.sequence[: steps * count]]
        same = torch.equal(logits, torch.cat(rows)) and outcome.steps == steps
        same &= found == exits and all(map(torch.equal, self._caches(), caches))
        depths = {depth for depth, _ in exits}
        detail = f"{outcome.steps} steps, exits after {sorted(depths)} layers"
        what = f"{steps} steps of {count} rows that exit by {name}"
        return KernelCheck(what, same and len(depths) > 1, detail)

    def _newest(
        self, tokens: Sequence[int], step: int, rule: list[Condition]
    ) -> list[SequenceInput]:
        placed = enumerate(zip(STARTS[: len(tokens)], tokens, strict=True))
        return [
            SequenceInput([(token, start + step, 0)], slot, None, rule, fills=True)
            for slot, (start, token) in placed
        ]

    def _exiting(
        self,
        tokens: Sequence[int],
        position: int,
        slot: int = 0,
        max_depth: int | None = None,
    ) -> SequenceInput:
        return SequenceInput.of_tokens(tokens, position, slot, max_depth or self._exit, fills=True)

    def _fill(self, first: int) -> None:
        """The slots' histories, of `first` positions and as sequences begin that go on together."""
        for slot, start in enumerate((first, *STARTS[1:])):
            self._launcher.fill(slot, start, seed=slot + 1)

    def _caches(self) -> list[Tensor]:
        return [cache.clone() for cache in (*self._launcher.keys, *self._launcher.values)]


def _exit_of(stop: SequenceOutcome) -> tuple[int, int]:
    return stop.depth, stop.criterion

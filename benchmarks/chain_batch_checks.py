"""Checks of batches: that they give what passes give, bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from chain_launcher import ChainLauncher, SequenceInput
from kernel_check import KernelCheck
from torch import Tensor

from sedac_export.cuda.chain_abi import BATCH_LOGITS_ROWS, BATCH_ROWS, MAX_ROWS, BatchRow, RowRace

# tokens of each prefill, one after the other
SPLITS = ((BATCH_ROWS, 44), (1, 63, 130), (17,), (2, 65))
# tokens of each of some sequences in a batch
BATCHES = ((1, 1, 1, 1), (3, 13, 1, 30), (33, 31), (40,), (1, 1, 70, 20), (30, 1, 100, 9))
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Tokens:
    """Consecutive tokens of the sequence in a slot."""

    slot: int
    position: int
    tokens: list[int]


@dataclass(frozen=True)
class Found:
    """What was left by tokens: caches and features, logits, and the tokens chosen of each row."""

    states: list[Tensor]
    logits: Tensor
    chosen: list[tuple[int, float, int]]


class BatchChecks:
    """Those of one launcher with two slots or more."""

    def __init__(self, launcher: ChainLauncher) -> None:
        self._launcher = launcher
        self._slots = len(launcher.keys[0])

    def run(self) -> Iterator[KernelCheck]:
        """From the first position on, and after some others."""
        layers = self._launcher.decoder.shape.layers
        self._features = self._launcher.take_features([1, layers // 2, layers])
        position = self._launcher.decoder.case.position
        for first in (0, position):
            for split in SPLITS:
                most = self._launcher.capacity - sum(split)
                yield self._prefill_as_passes(min(first, most), split)
        for lengths in BATCHES:
            yield self._batch_as_passes(position, lengths[: self._slots])
        self._launcher.feature_depths = []

    def _prefill_as_passes(self, position: int, split: tuple[int, ...]) -> KernelCheck:
        launcher, tokens = self._launcher, self._random_tokens(sum(split))
        for slot in range(2):
            launcher.fill(slot, position)
            self._features[slot].zero_()
        for first in range(0, len(tokens), MAX_ROWS):
            some = tokens[first : first + MAX_ROWS]
            launcher.run([SequenceInput.of_tokens(some, position + first)], logits_rows=0)
        done = 0
        for length in split:
            some = tokens[done : done + length]
            launcher.launch_batch(launcher.make_prefill(some, position + done, slot=1))
            done += length
        torch.cuda.synchronize()
        caches = (*launcher.keys, *launcher.values, self._features)
        different = sum(int((cache[0] != cache[1]).sum()) for cache in caches)
        name = f"prefill of {'+'.join(map(str, split))} tokens from position {position} as passes"
        return KernelCheck(name, different == 0, f"{different} numbers differ")

    def _batch_as_passes(self, position: int, lengths: tuple[int, ...]) -> KernelCheck:
        tokens = self._random_tokens(sum(lengths))
        sequences, done = [], 0
        for slot, length in enumerate(lengths):
            # positions in other chunks of attention, and the last ones there are
            room = self._launcher.capacity - length
            start = (position - 3, 0, room, position // 2)[slot]
            sequences.append(Tokens(slot, start, tokens[done : done + length]))
            done += length
        keys = torch.randint(1 << 62, (done,), generator=torch.Generator().manual_seed(1)).tolist()
        races = [RowRace(key, 1 / TEMPERATURE) for key in keys]
        wanted = slice(0, done, 1 + done // (BATCH_LOGITS_ROWS + 1))
        passes = self._by_passes(sequences, races, wanted)
        batch = self._by_batch(sequences, races, wanted)
        pairs = zip((*passes.states, passes.logits), (*batch.states, batch.logits), strict=True)
        different = sum(int((a != b).sum()) for a, b in pairs)
        different += sum(a != b for a, b in zip(passes.chosen, batch.chosen, strict=True))
        name = f"a batch of {'+'.join(map(str, lengths))} tokens as passes"
        return KernelCheck(name, different == 0, f"{different} numbers differ")

    def _by_passes(self, sequences: list[Tokens], races: list[RowRace], wanted: slice) -> Found:
        launcher, logits, chosen, done = self._launcher, [], [], 0
        self._fill(sequences)
        for of in sequences:
            for first in range(0, len(of.tokens), MAX_ROWS):
                some = of.tokens[first : first + MAX_ROWS]
                row = SequenceInput.of_tokens(some, of.position + first, of.slot)
                logits.append(launcher.run([row], races=races[done : done + len(some)]))
                outcome = launcher.outcome()
                for row_outcome, race in zip(outcome.row[: len(some)], outcome.race, strict=False):
                    chosen.append((row_outcome.token, row_outcome.logit, race.token))
                done += len(some)
        return Found(self._states(), torch.cat(logits)[wanted], chosen[wanted])

    def _by_batch(self, sequences: list[Tokens], races: list[RowRace], wanted: slice) -> Found:
        self._fill(sequences)
        rows = [
            BatchRow(token, of.position + index, of.slot)
            for of in sequences
            for index, token in enumerate(of.tokens)
        ]
        chosen_rows = range(len(rows))[wanted]
        races_of = dict(enumerate(races[wanted]))
        logits = self._launcher.run_batch(self._launcher.make_batch(rows, chosen_rows, races_of))
        outcome = self._launcher.batch_outcome()
        chosen = [
            (row.token, row.logit, race.token)
            for row, race in zip(outcome.row[: len(chosen_rows)], outcome.race, strict=False)
        ]
        return Found(self._states(), logits, chosen)

    def _fill(self, sequences: list[Tokens]) -> None:
        for of in sequences:
            self._launcher.fill(of.slot, of.position)
            self._features[of.slot].zero_()

    def _states(self) -> list[Tensor]:
        caches = (*self._launcher.keys, *self._launcher.values, self._features)
        return [cache.clone() for cache in caches]

    def _random_tokens(self, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(count)
        vocabulary = self._launcher.decoder.shape.vocabulary
        tokens: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
        return tokens

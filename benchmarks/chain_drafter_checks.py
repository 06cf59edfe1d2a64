"""Checks of a trained drafter in the chain's kernel, against PyTorch in fp32."""

import ctypes
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from chain_drafter import RandomDrafter
from chain_launcher import ChainLauncher, SequenceInput
from kernel_check import TOKENS, KernelCheck, relative_error

from sedac_export.cuda.chain_abi import MARGIN_BINS, MAX_ROWS, BatchRow, RowRace

# hidden states are kept in bf16
_ROUNDING = 2**-7
_POSITIONS = 300
_STEPS = 6
# of the drafter's products, whose inputs are fp16, in a probability
_TOLERANCE = 0.02
_TEMPERATURE = 0.8


class DrafterChecks:
    """Every check of a drafter beside one launcher."""

    def __init__(self, launcher: ChainLauncher) -> None:
        self._launcher, self._drafter = launcher, RandomDrafter(launcher)
        generator = torch.Generator("cuda").manual_seed(6)
        vocabulary = launcher.decoder.shape.vocabulary
        self._followed: list[int] = torch.randint(
            vocabulary, (_POSITIONS,), device="cuda", generator=generator
        ).tolist()
        self._random = torch.randn(
            self._drafter.features[0].shape, device="cuda", generator=generator
        ).bfloat16()

    def run(self) -> Iterator[KernelCheck]:
        """One check after another; passes leave hidden states no more afterwards."""
        with torch.no_grad():
            yield from self._hidden_states()
            for states in self._drafter.features:
                states[:] = self._random
            for positions in (1, 5, _POSITIONS):
                yield from self._drafts(positions)
            yield self._other_pieces()
            yield self._other_slot()
            yield self._end_of_draft()
            yield from self._several_sequences()
            yield from self._drafts_after_passes()
            yield from self._nothing_after_nan()
        self._launcher.feature_depths = []

    def _hidden_states(self) -> Iterator[KernelCheck]:
        """A pass of several rows, and one that goes on, leave what PyTorch computes."""
        decoder, position = self._launcher.decoder, 130
        history = self._launcher.fill(0, position)
        rows = TOKENS[:3]
        self._launcher.run([SequenceInput.of_tokens(rows, position)])
        for index, depth in enumerate(self._launcher.feature_depths):
            wanted = decoder.compute(history, rows, depth).hidden
            kept = self._drafter.features[0, position : position + len(rows), index].float()
            error = relative_error(kept, wanted)
            name = f"hidden states after {depth} layers"
            yield KernelCheck(name, error < _ROUNDING, f"relative error {error:.1e}")
        kept = self._drafter.features[0, position : position + 3].clone()
        self._launcher.fill(0, position)
        sequence = SequenceInput.of_tokens(rows[:1], position)
        self._launcher.run_pass(self._launcher.make_pass([sequence], steps=2))
        one_by_one = self._drafter.features[0, position : position + 2]
        same = torch.equal(one_by_one[0], kept[0]) and bool((one_by_one[1] != kept[1]).any())
        yield KernelCheck("hidden states of a pass of two steps", same)

    def _drafts(self, positions: int) -> Iterator[KernelCheck]:
        followed = self._followed[:positions]
        for temperature in (0.0, _TEMPERATURE):
            races = _races() if temperature else []
            tokens, probabilities = self._drafter.draft(0, followed, _STEPS, races=races)
            logits = self._drafter.logits(0, followed, tokens)
            places = torch.searchsorted(self._drafter.tokens, torch.tensor(tokens, device="cuda"))
            shares = logits.softmax(-1).gather(1, places[:, None])[:, 0]
            given = torch.tensor(probabilities, device="cuda")
            error = (shares - given).abs().max().item()
            right = error < _TOLERANCE and len(tokens) == _STEPS
            if not temperature:
                right = right and bool((logits.softmax(-1).max(-1).values - shares < 0.02).all())
            chosen = "sampled" if temperature else "most probable"
            yield KernelCheck(
                f"{chosen} drafts after {positions} positions", right, f"error {error:.1e}"
            )

    def _other_pieces(self) -> KernelCheck:
        at_once = (1, 3, MAX_ROWS)
        drafts = [self._drafter.draft(0, self._followed[:40], _STEPS, each)[0] for each in at_once]
        return KernelCheck(
            "drafts whatever is taken in at once", drafts[0] == drafts[1] == drafts[2]
        )

    def _other_slot(self) -> KernelCheck:
        one = self._drafter.draft(0, self._followed[:40], _STEPS)
        self._drafter.draft(0, self._followed[10:20], _STEPS)
        return KernelCheck(
            "the same in another slot", one == self._drafter.draft(1, self._followed[:40], _STEPS)
        )

    def _end_of_draft(self) -> KernelCheck:
        wanted = self._drafter.make(0, 0, self._followed[:1], MAX_ROWS)
        wanted.acceptance = (ctypes.c_float * MARGIN_BINS)(*[0.5] * MARGIN_BINS)
        wanted.min_accepted = (ctypes.c_float * MAX_ROWS)(*[0.125] * MAX_ROWS)
        count = len(self._drafter.launch([wanted])[0][0])
        return KernelCheck("drafts end where they do not pay", count == 4, f"{count} tokens")

    def _several_sequences(self) -> Iterator[KernelCheck]:
        """Each is drafted for as alone, whatever the others take in, and however they draft."""
        slots = len(self._drafter.features)
        # what launches of another number of sequences left behind does not matter
        for count in (slots, 2, 1, slots):
            alone, wanted = [], []
            for slot in range(count):
                length, taken, steps = 40 + 13 * slot, 1 + 3 * slot % 5, _STEPS - slot
                followed, races = self._followed[slot : slot + length], _races() if slot % 2 else []
                alone.append(self._drafter.draft(slot, followed, steps, races=races))
                start = length - taken
                wanted.append(self._drafter.make(slot, start, followed[start:], steps, races))
            together = self._drafter.launch(wanted)
            same = [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]
            given = torch.tensor([[sum(of[1]) for of in drafts] for drafts in (together, alone)])
            error = (given[0] - given[1]).abs().max().item()
            name = f"drafts for {count} sequences at once"
            yield KernelCheck(name, same and error < 1e-4, f"error {error:.1e}")

    def _drafts_after_passes(self) -> Iterator[KernelCheck]:
        """A launch after what verifies, whatever is accepted, is one that is told what."""
        launcher, position = self._launcher, 40
        rows = min(4, launcher.chain.facts.draft_rows)
        for slot in range(2):
            launcher.fill(slot, position, seed=slot + 1)
        chosen = [self._greedy(TOKENS[0], position, rows, slot) for slot in range(2)]
        cases = product(range(rows), ([], _races(rows + _STEPS)), ("pass", "batch"))
        for accepted, races, by in cases:
            # the other sequence's tokens are all accepted
            drafted = [list(of[: rows - 1]) for of in chosen]
            if accepted < rows - 1:
                drafted[0][accepted] = (chosen[0][accepted] + 1) % launcher.decoder.shape.vocabulary
            for slot in range(2):
                # what was drafted for before is taken in again
                self._drafter.draft(slot, self._followed[:position], 1)
            outcome = self._verify(by, [[TOKENS[0], *of] for of in drafted], position, races)
            following, told = [], []
            for slot in range(2):
                own = outcome[slot * rows :][:rows]
                taken = next((i for i in range(rows - 1) if own[i] != drafted[slot][i]), rows - 1)
                wanted = slot, position, drafted[slot], _STEPS, slot * rows, races
                following.append(self._drafter.make_following(*wanted))
                followed = own[: taken + 1]
                told.append((slot, position, followed, _STEPS, races[taken:][:_STEPS]))
            after = self._drafter.launch(following)
            takes = [self._drafter.taken_in(slot) for slot in range(2)]
            before = [self._drafter.launch([self._drafter.make(*each)])[0] for each in told]
            right = [tokens for tokens, _ in after] == [tokens for tokens, _ in before]
            right &= takes == [(len(each[2]), each[2][-1]) for each in told]
            right &= bool(races) or takes[0][0] == accepted + 1
            how = "sampled drafts" if races else "drafts"
            yield KernelCheck(f"{how} after a {by}, {accepted} accepted", right)

    def _verify(
        self, by: str, tokens: list[list[int]], position: int, races: list[RowRace]
    ) -> list[int]:
        """Tokens in slots 0 and 1, in a pass or a batch: what is chosen after each."""
        launcher, count = self._launcher, len(tokens[0])
        of_rows = [*races[:count], *races[:count]]
        if by == "pass":
            sequences = [
                SequenceInput.of_tokens(of, position, slot) for slot, of in enumerate(tokens)
            ]
            launcher.run(sequences, races=of_rows)
            outcome: Any = launcher.outcome()
        else:
            rows = [
                BatchRow(token, position + index, slot)
                for slot, of in enumerate(tokens)
                for index, token in enumerate(of)
            ]
            wanted = launcher.make_batch(rows, range(len(rows)), dict(enumerate(of_rows)))
            launcher.run_batch(wanted)
            outcome = launcher.batch_outcome()
        found = outcome.race if races else outcome.row
        return [found[row].token for row in range(2 * count)]

    def _greedy(self, token: int, position: int, count: int, slot: int) -> list[int]:
        """The tokens that full depth chooses after `token`."""
        chosen: list[int] = []
        for _ in range(count):
            tokens = [token, *chosen]
            self._launcher.run([SequenceInput.of_tokens(tokens, position, slot)])
            chosen.append(self._launcher.outcome().row[len(tokens) - 1].token)
        return chosen

    def _nothing_after_nan(self) -> Iterator[KernelCheck]:
        """Logits that are not finite leave no token, and what follows drafts nothing."""
        position, values = 40, self._launcher.values[0]
        kept = values[0, :, 0].clone()
        for by in ("pass", "batch"):
            values[0, :, 0] = float("nan")
            self._verify(by, [[1, 2], [1, 2]], position, [])
            values[0, :, 0] = kept
            none = self._launcher.chosen[:4].tolist()[:2] == [-1, -1]
            wanted = self._drafter.make_following(0, position, [2], _STEPS, 0)
            right = none and self._drafter.launch([wanted]) == [([], [])]
            yield KernelCheck(f"no draft after NaN in a {by}", right)


def _races(count: int = _STEPS) -> list[RowRace]:
    """Of as many tokens."""
    return [RowRace(7919 * k + 1, 1 / _TEMPERATURE) for k in range(count)]

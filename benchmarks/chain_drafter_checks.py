"""Checks of a trained drafter in the chain's kernel, against PyTorch in fp32."""

import ctypes
from collections.abc import Iterator

import torch
from chain_drafter import RandomDrafter
from chain_launcher import ChainLauncher, SequenceInput
from kernel_check import TOKENS, KernelCheck, relative_error

from sedac_export.cuda.chain_abi import MARGIN_BINS, MAX_ROWS, RowRace

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
            yield self._nothing_after_nan()
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
        """A launch after the pass that verifies, whatever is accepted, is one that is told what."""
        position, rows = 40, 4
        for slot in range(2):
            self._launcher.fill(slot, position, seed=slot + 1)
        chosen = self._greedy(TOKENS[0], position, rows)
        for accepted in range(rows):
            for races in ([], _races(rows + _STEPS)):
                drafted = list(chosen[: rows - 1])
                if accepted < rows - 1:
                    drafted[accepted] = (
                        chosen[accepted] + 1
                    ) % self._launcher.decoder.shape.vocabulary
                other = SequenceInput.of_tokens(TOKENS[:2], position, slot=1)
                verified = SequenceInput.of_tokens([TOKENS[0], *drafted], position)
                # what was drafted for before is taken in again
                self._drafter.draft(0, self._followed[:position], 1)
                self._launcher.run([other, verified])
                wanted = self._drafter.make_following(0, position, drafted, _STEPS, 2, races)
                ((after, _),) = self._drafter.launch([wanted])
                taken = self._drafter.taken_in(0)
                followed = chosen[: accepted + 1]
                told = self._drafter.make(0, position, followed, _STEPS, races[accepted:][:_STEPS])
                ((before, _),) = self._drafter.launch([told])
                right = after == before and taken == (accepted + 1, followed[-1])
                how = "sampled" if races else "most probable"
                yield KernelCheck(f"{how} drafts after a pass, {accepted} accepted", right)

    def _greedy(self, token: int, position: int, count: int) -> list[int]:
        """The tokens that full depth chooses after `token` in slot 0."""
        chosen: list[int] = []
        for _ in range(count):
            tokens = [token, *chosen]
            self._launcher.run([SequenceInput.of_tokens(tokens, position)])
            chosen.append(self._launcher.outcome().row[len(tokens) - 1].token)
        return chosen

    def _nothing_after_nan(self) -> KernelCheck:
        self._launcher.chosen[0] = -1
        wanted = self._drafter.make_following(0, 40, [1, 2], _STEPS, 0)
        return KernelCheck("no draft after NaN", self._drafter.launch([wanted]) == [([], [])])


def _races(count: int = _STEPS) -> list[RowRace]:
    """Of as many tokens."""
    return [RowRace(7919 * k + 1, 1 / _TEMPERATURE) for k in range(count)]

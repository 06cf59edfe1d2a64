"""Checks of prefill: that it leaves in caches what passes leave there, bit for bit."""

from collections.abc import Iterator

import torch
from chain_launcher import ChainLauncher, SequenceInput
from kernel_check import KernelCheck

from sedac_export.cuda.chain_abi import MAX_ROWS, PREFILL_ROWS

# tokens of each prefill, one after the other
SPLITS = ((PREFILL_ROWS, 44), (1, 63, 130), (17,), (2, 65))


class PrefillChecks:
    """Those of one launcher with two slots or more."""

    def __init__(self, launcher: ChainLauncher) -> None:
        self._launcher = launcher

    def run(self) -> Iterator[KernelCheck]:
        """From the first position on, and after some others."""
        layers = self._launcher.decoder.shape.layers
        features = self._launcher.take_features([1, layers // 2, layers])
        for position in (0, self._launcher.decoder.case.position):
            for split in SPLITS:
                if position + sum(split) <= self._launcher.capacity:
                    yield self._same_as_passes(position, split, features)
        self._launcher.feature_depths = []

    def _same_as_passes(
        self, position: int, split: tuple[int, ...], features: torch.Tensor
    ) -> KernelCheck:
        launcher, count = self._launcher, sum(split)
        generator = torch.Generator().manual_seed(count)
        vocabulary = launcher.decoder.shape.vocabulary
        tokens = torch.randint(vocabulary, (count,), generator=generator).tolist()
        for slot in range(2):
            launcher.fill(slot, position)
            features[slot].zero_()
        for first in range(0, count, MAX_ROWS):
            some = tokens[first : first + MAX_ROWS]
            launcher.run([SequenceInput.of_tokens(some, position + first)], logits_rows=0)
        first = 0
        for length in split:
            some = tokens[first : first + length]
            launcher.prefill(launcher.make_prefill(some, position + first, slot=1))
            first += length
        torch.cuda.synchronize()
        pairs = [cache[:2] for cache in (*launcher.keys, *launcher.values, features)]
        different = sum(int((a != b).sum()) for a, b in pairs)
        name = f"prefill of {'+'.join(map(str, split))} tokens from position {position} as passes"
        return KernelCheck(name, different == 0, f"{different} numbers differ")

"""Compare what a model's own masks let each token see with what its layers tell attention.

Engines know a causal order and a window, from the arguments of transformers' attention interface.
What a model says by a mask alone, such as chunks, would be lost in them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

# (batch, head, query position, key position) -> whether the query sees the key, all int64
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class KnownMasks:
    """Makes a model's masks in transformers' place, and remembers what each one means.

    positions is how many a text may have: beyond them masks may say what they like.
    """

    positions: int
    made: list[tuple[Tensor, MaskFunction]] = field(default_factory=list)
    compared: dict[tuple[int, int | None], bool] = field(default_factory=dict)

    def __call__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: MaskFunction,
        **_: Any,
    ) -> Tensor:
        """transformers' mask interface: a placeholder mask [batch, 1, queries, keys]."""
        mask = torch.zeros(batch_size, 1, q_length, kv_length)
        self.made.append((mask, mask_function))
        return mask

    def is_causal(self, mask: Tensor, window: int | None) -> bool:
        """Whether `mask` shows each position the last `window`, or all, up to itself."""
        place = next((i for i, (made, _) in enumerate(self.made) if made is mask), None)
        if place is None:
            return False
        if (place, window) not in self.compared:  # layers share masks
            self.compared[place, window] = self._shows(self.made[place][1], window)
        return self.compared[place, window]

    def _shows(self, function: MaskFunction, window: int | None) -> bool:
        queries, keys = self._queries()[:, None], torch.arange(self.positions)[None]
        expected = keys <= queries
        if window is not None:
            expected &= keys > queries - window
        zero = torch.zeros((), dtype=torch.int64)
        seen = function(zero, zero, queries, keys)
        return torch.equal(seen.expand(expected.shape), expected)

    def _queries(self) -> Tensor:
        """Positions close together at first, then ever further apart, and the last."""
        steps = [0]
        while steps[-1] < self.positions - 1:
            steps.append(min(steps[-1] + 1 + steps[-1] // 16, self.positions - 1))
        return torch.tensor(steps)


@contextlib.contextmanager
def known_masks(implementation: str, positions: int) -> Iterator[KnownMasks]:
    """Within this context masks for the attention `implementation` are made by the result."""
    masks = KnownMasks(positions)
    ALL_MASK_ATTENTION_FUNCTIONS.register(implementation, masks)
    try:
        yield masks
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[implementation]

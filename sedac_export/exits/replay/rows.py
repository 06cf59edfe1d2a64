"""How far each of several tokens has come that pass through the layers together."""

import numpy as np
import numpy.typing as npt

from sedac_export.arrays import Floats, Mask


class Rows:
    """n tokens on their way through `layers` layers; `decided` ones, bool [n], never exit."""

    def __init__(self, layers: int, decided: Mask) -> None:
        tokens = len(decided)
        self.layers = layers
        self.exits = np.full(tokens, layers, dtype=np.int64)
        self.exited = np.zeros(tokens, dtype=bool)
        self.undecided = ~decided
        self.skip_from = np.full(tokens, layers, dtype=np.int64)
        self.stabilities = np.zeros((tokens, layers), dtype=np.float32)

    def last_stabilities(self, depth: int) -> Floats:
        """Stabilities of the depths depth - 2 to depth, 0 where below 1: [n, 3]."""
        last = self.stabilities[:, max(0, depth - 3) : depth]
        return np.pad(last, ((0, 0), (3 - last.shape[1], 0)))

    def leave(self, wants: Mask, depth: int, soft_ratio: Floats | None) -> Mask:
        """Let those of `wants` that run on exit after `depth` layers, and say who they are.

        With a soft_ratio [n] they stay, and that share of the remaining layers, the last ones,
        skips its MLP.
        """
        leaving = wants & self.undecided
        self.undecided &= ~leaving
        self.exits[leaving] = depth
        if soft_ratio is None:
            self.exited |= leaving
        else:
            # half up, as Rust rounds
            skipped = np.floor(soft_ratio * (self.layers - depth) + 0.5).astype(np.int64)
            self.skip_from[leaving] = self.layers - skipped[leaving]
        return leaving

    def depths(self) -> npt.NDArray[np.int64]:
        """Layers run whole."""
        return np.where(self.exited, self.exits, self.skip_from)

    def head_depths(self) -> npt.NDArray[np.int64]:
        """The depth whose lens each token's state goes through; soft exits reach the last."""
        return np.where(self.exited, self.exits, self.layers)

"""Where the tokens of a pass exit, as the core decides."""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from sedac_export.arrays import Floats, Mask
from sedac_export.exits.replay.signals import Signals
from sedac_runtime._core import BatchDecision, PolicySettings


class PassExits:
    """n tokens on their way through the layers together.

    exits: the depth of each token's decision to exit, int64 [n], the number of layers without one.
    exited: which have left, bool [n]; soft exits stay. skip_from: the first layer that each runs
    without its MLP, int64 [n], the number of layers if none. stabilities: fp32 [n, layers].
    """

    def __init__(
        self,
        policy: PolicySettings | None,
        num_layers: int,
        exit_layers: Collection[int],
        full_depth: Mask,
    ) -> None:
        """Tokens exit by `policy` after the depths `exit_layers`; those of `full_depth`, bool [n],
        and without a policy all, never do.

        Raises InputError when a setting of the policy is out of range.
        """
        if policy is None:
            policy, exit_layers = PolicySettings("stability", consecutive_k=1), ()
        self.num_layers = num_layers
        self._decision = BatchDecision(policy, num_layers, list(exit_layers), full_depth)
        self.stabilities = np.zeros((len(full_depth), num_layers), dtype=np.float32)
        self._read_decision()

    def observe(self, signals: Signals) -> Mask:
        """Decide by `signals`, and say which tokens leave now; asked after every layer, in order.

        Raises SedacError where the policy reads a signal that is not there.
        """
        depth, decision, before = signals.depth, self._decision, self.exited
        decision.observe(
            depth,
            signals.stability,
            signals.read_risk() if self.reads_risk(depth) else None,
            signals.exit if self.reads_exit_head(depth) else None,
        )
        self._read_decision()
        return self.exited & ~before

    def reads_risk(self, depth: int) -> bool:
        """Whether the decision after `depth` layers takes the V6 probe's risk."""
        return self._decision.reads_risk(depth)

    def reads_exit_head(self, depth: int) -> bool:
        """Whether the decision after `depth` layers takes the exit engine's signals."""
        return self._decision.reads_exit_head(depth)

    def last_stabilities(self, depth: int) -> Floats:
        """Stabilities of the depths depth - 2 to depth, 0 where below 1: [n, 3]."""
        last = self.stabilities[:, max(0, depth - 3) : depth]
        return np.pad(last, ((0, 0), (3 - last.shape[1], 0)))

    def depths(self) -> npt.NDArray[np.int64]:
        """Layers run whole."""
        return np.where(self.exited, self.exits, self.skip_from)

    def head_depths(self) -> npt.NDArray[np.int64]:
        """The depth whose lens each token's state goes through; soft exits reach the last."""
        return np.where(self.exited, self.exits, self.num_layers)

    def _read_decision(self) -> None:
        decision: Any = self._decision
        self.exits: npt.NDArray[np.int64] = np.asarray(decision.exit_layers)
        self.exited: Mask = np.asarray(decision.exited)
        self.skip_from: npt.NDArray[np.int64] = np.asarray(decision.skip_from)

"""What a policy sees of some tokens after a layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from sedac_export.arrays import Floats
from sedac_export.errors import SedacError


@dataclass
class Signals:
    """The signals of n tokens after `depth` layers.

    stability: fp32 [n]. risk: the V6 probe's, fp32 [n], None at depths without one. run_exit gives
    the exit engine's margin, entropy (nats) and learned, fp32 [n, 3]; it runs when one is read.
    """

    depth: int
    stability: Floats
    risk: Floats | None
    run_exit: Callable[[], Floats]

    def read_risk(self) -> Floats:
        """The V6 probe's risk. Raises SedacError at a depth without a probe."""
        if self.risk is None:
            raise SedacError(
                f"the bundle has no probe at depth {self.depth}; train with"
                f" sedac-export train-probes --probe-layers {self.depth},..."
            )
        return self.risk

    @cached_property
    def exit(self) -> Floats:
        """margin, entropy and learned, fp32 [n, 3]."""
        return self.run_exit()

    @property
    def margin(self) -> Floats:
        """Difference of the two largest probabilities of the pruned head."""
        return self.exit[:, 0]

    @property
    def learned(self) -> Floats:
        """Probability that the exit's token is full depth's."""
        return self.exit[:, 2]

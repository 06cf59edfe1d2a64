"""What is known of some tokens after a layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from sedac_export.arrays import Floats
from sedac_export.errors import SedacError


@dataclass
class Signals:
    """The signals of n tokens after `depth` layers.

    stability: fp32 [n]. risk: the V6 probe's, fp32 [n], None at depths without one. run_exit gives
    the exit engine's signals, fp32 [n, 3]; it runs when they are first read.
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
        """margin (of probabilities), entropy (nats) and learned (probability): fp32 [n, 3]."""
        return self.run_exit()

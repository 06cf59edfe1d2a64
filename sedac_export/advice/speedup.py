"""How much faster one setting is than another, from paired times."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from sedac_export.arrays import Floats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Speedup:
    """An estimate, and the ends of its bootstrap interval at CONFIDENCE."""

    value: float
    low: float
    high: float


def speedup(reference: Floats, times: Floats) -> Speedup:
    """How many times as fast as `reference` a setting is, both times [prompts >= 2, rounds].

    Times of the same prompt and round were taken one after the other, so their ratio is free of
    what else the machine did. A prompt counts with the median over its rounds, and all prompts
    together with the mean of these ratios: the ratio of the total times where prompts weigh the
    same. The interval is for other prompts of the same kind.
    """
    ratios = np.median(times / reference, axis=1)
    if np.ptp(ratios) == 0:
        return Speedup(*[1 / float(ratios[0])] * 3)
    interval = bootstrap(
        (ratios,),
        lambda sample, axis: 1 / sample.mean(axis=axis),
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Speedup(1 / float(ratios.mean()), float(interval.low), float(interval.high))

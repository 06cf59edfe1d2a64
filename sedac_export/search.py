"""Search policies and thresholds on observed signals, before any of them is replayed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from sedac_export.costs import Costs
from sedac_export.exit_config import ExitConfig, PolicyName
from sedac_export.observe import Observations
from sedac_export.policies import make_policy
from sedac_export.signals import Floats, Signals

# prices of an error, in full-depth tokens: from nearly free to nearly forbidden
_PRICES = np.geomspace(1.0, 300.0, 64)
_SWEEPS = 3
_TAUS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.993, 0.995, 0.997, 0.998, 0.999, 0.9995)
_MIN_RATIOS = (0.2, 0.5, 0.75)
_MULTIPLES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
_TARGETS = (0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.2)

Depths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Candidate:
    """A setting, and what the observations predict of it.

    risk: share of tokens that would be wrong, caches taken as full depth's; speedup: full depth's
    time over its time, by the cost model.
    """

    config: ExitConfig
    risk: float
    speedup: float


def search(seen: Observations, costs: Costs) -> list[Candidate]:
    """Candidates of every policy that the observations have signals for."""
    candidates = [*_stability(seen, costs)]
    for policy, scores in _scored(seen).items():
        candidates += _by_thresholds(seen, costs, policy, scores)
    if seen.risk:
        candidates += _cascades(seen, costs)
    return candidates


def exits_of(seen: Observations, config: ExitConfig) -> Depths:
    """The depth at which each observed token would exit under `config`."""
    policy = make_policy(config, seen.num_layers)
    count = len(seen.full)
    policy.begin(count)
    depths = np.full(count, seen.num_layers)
    for depth in range(1, seen.num_layers):
        empty = np.zeros(count, dtype=np.float32)
        signal = np.stack(
            [seen.margin.get(depth, empty), empty, seen.learned.get(depth, empty)], axis=1
        )
        stability = seen.stability[:, depth - 1]
        wants = policy.observe(
            Signals(depth, stability, seen.risk.get(depth), partial(_same, signal))
        )
        if depth in seen.tokens:
            depths[wants & (depths == seen.num_layers)] = depth
    return depths


def _same(value: Floats) -> Floats:
    return value


def judge(seen: Observations, costs: Costs, config: ExitConfig) -> Candidate:
    """What the observations predict of `config`."""
    depths = exits_of(seen, config)
    wrong = np.zeros(len(depths), dtype=bool)
    for depth in seen.tokens:
        here = depths == depth
        wrong[here] = seen.wrong(depth)[here]
    asked = config.thresholds if config.policy in ("margin", "learned") else None
    checks = sum(
        ((depths >= depth).astype(np.int64) for depth in asked or ()), np.zeros_like(depths)
    )
    speedup = costs.full / float(costs.of(depths, checks).mean())
    return Candidate(config, float(wrong.mean()), speedup)


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both risk and speed, safest first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.risk, -c.speedup)):
        if not best or candidate.speedup > best[-1].speedup:
            best.append(candidate)
    return best


def _scored(seen: Observations) -> dict[PolicyName, dict[int, Floats]]:
    """By policy and depth a number that is larger the surer the policy is."""
    scores: dict[PolicyName, dict[int, Floats]] = {}
    if seen.margin:
        scores |= {"margin": seen.margin, "learned": seen.learned}
    if seen.risk:
        scores["probe"] = {depth: -risk for depth, risk in seen.risk.items()}
    return scores


def _stability(seen: Observations, costs: Costs) -> Iterator[Candidate]:
    for tau in _TAUS:
        for k in (2, 3, 4):
            for ratio in _MIN_RATIOS:
                if k <= seen.num_layers:
                    config = ExitConfig(tau=tau, consecutive_k=k, min_layer_ratio=ratio)
                    yield judge(seen, costs, config)


def _cascades(seen: Observations, costs: Costs) -> Iterator[Candidate]:
    medians = {depth: float(np.median(risk)) for depth, risk in seen.risk.items()}
    for multiple in _MULTIPLES:
        for target in _TARGETS:
            config = ExitConfig(
                policy="cascade",
                thresholds={d: max(m * multiple, 1e-6) for d, m in medians.items()},
                weights=dict.fromkeys(medians, 1.0),
                targets=dict.fromkeys(medians, target),
            )
            yield judge(seen, costs, config)


def _by_thresholds(
    seen: Observations, costs: Costs, policy: PolicyName, scores: dict[int, Floats]
) -> Iterator[Candidate]:
    """For each price of an error the thresholds that make errors and time cheapest together."""
    check = costs.exit if policy != "probe" else 0.0
    for price in _PRICES:
        thresholds = _optimize(seen, costs, scores, check, float(price) * costs.full)
        if not thresholds:
            continue
        sign = -1 if policy == "probe" else 1
        rounded = {depth: _outward(sign * value) for depth, value in thresholds.items()}
        if policy == "probe":
            rounded = {depth: max(value, 1e-6) for depth, value in rounded.items()}
        yield judge(seen, costs, ExitConfig(policy=policy, thresholds=rounded))


def _optimize(
    seen: Observations, costs: Costs, scores: dict[int, Floats], check: float, price: float
) -> dict[int, float]:
    """Thresholds by depth, found from the deepest up, each given the others; some sweeps of it.

    A token reaching depth d may exit there at a known cost or go on at the cost that the deeper
    thresholds give it; sorted by score, the best threshold is where the sum of the differences is
    least. Depths that do not pay for asking are left out.
    """
    depths = sorted(scores)
    thresholds: dict[int, float] = dict.fromkeys(depths, math.inf)
    wrong = {depth: seen.wrong(depth) for depth in depths}
    step = costs.layer - costs.fill
    for _ in range(_SWEEPS):
        # what a token pays from here on if it runs to the end
        ahead = np.full(len(seen.full), seen.num_layers * step)
        for depth in reversed(depths):
            leave = depth * step + price * wrong[depth]
            reaching = _reaching(scores, thresholds, depth)
            thresholds[depth] = _best(scores[depth], leave - ahead, reaching, check)
            if thresholds[depth] < math.inf:
                ahead = check + np.where(scores[depth] >= thresholds[depth], leave, ahead)
    return {depth: value for depth, value in thresholds.items() if value < math.inf}


def _reaching(
    scores: dict[int, Floats], thresholds: dict[int, float], depth: int
) -> npt.NDArray[np.bool_]:
    reaching = np.ones(len(scores[depth]), dtype=bool)
    for shallower, threshold in thresholds.items():
        if shallower < depth:
            reaching &= scores[shallower] < threshold
    return reaching


def _best(
    scores: Floats,
    gains: npt.NDArray[np.float64],
    reaching: npt.NDArray[np.bool_],
    check: float,
) -> float:
    """The threshold whose exits make the sum of `gains` least, infinity if none pays its checks."""
    here = scores[reaching]
    if not len(here):
        return math.inf
    order = np.argsort(-here)
    sums = np.cumsum(gains[reaching][order])
    least = int(np.argmin(sums))
    if sums[least] + check * len(here) >= 0:
        return math.inf
    return float(here[order[least]])


def _outward(value: float) -> float:
    """Six digits, so that files are legible."""
    return float(f"{value:.6g}")

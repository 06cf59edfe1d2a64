"""Search policies and thresholds on observed signals, before any of them is replayed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sedac_export.arrays import Floats, Mask
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.exits.calibration.engine_times import EngineTimes
from sedac_export.exits.calibration.learn_then_test import Losses
from sedac_export.exits.calibration.observe import Observations
from sedac_runtime._core import BatchDecision
from sedac_runtime.choices import KvFill, PolicyName

# prices of an error, in full-depth tokens: from nearly free to nearly forbidden
_PRICES = np.geomspace(1.0, 300.0, 40)
# the optimum moves in steps; settings in between are those around it
_SCALES = (0.8, 0.87, 0.94, 1.0, 1.07, 1.15, 1.25)
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


def search(seen: Observations, engine_times: EngineTimes, kv_fill: KvFill) -> list[Candidate]:
    """Candidates of every policy that the observations have signals for."""
    configs = [*_stability(seen)]
    for policy, scores in _scored(seen).items():
        configs += _by_thresholds(seen, engine_times, kv_fill, policy, scores)
    if seen.risk:
        configs += _cascades(seen)
    filled = (config.model_copy(update={"kv_fill": kv_fill}) for config in configs)
    return [judge(seen, engine_times, config) for config in filled]


def exits_of(seen: Observations, config: ExitConfig) -> Depths:
    """The depth at which each observed token would exit under `config`."""
    full_depth = np.zeros(len(seen.full), dtype=bool)
    decision = BatchDecision(
        config.policy_settings(), seen.num_layers, list(seen.tokens), full_depth
    )
    for depth in range(1, seen.num_layers):
        decision.observe(
            depth,
            seen.stability[:, depth - 1],
            seen.risk.get(depth),
            seen.exit_signals(depth) if decision.reads_exit_head(depth) else None,
        )
    return np.asarray(decision.exit_layers)


def count_checks(config: ExitConfig, depths: Depths) -> Depths:
    """How many exit engines ran for tokens that exited after `depths` layers."""
    asked = config.thresholds if config.policy in ("margin", "learned") else None
    checks = np.zeros_like(depths)
    for depth in asked or ():
        checks += depths >= depth
    return checks


def wrong_at(seen: Observations, depths: Depths) -> Mask:
    """Which observed tokens would be wrong if they exited after `depths` layers."""
    wrong = np.zeros(len(depths), dtype=bool)
    for depth in seen.tokens:
        here = depths == depth
        wrong[here] = seen.wrong(depth)[here]
    return wrong


def losses_of(
    seen: Observations, counts: Sequence[int], config: ExitConfig
) -> tuple[Losses, Depths]:
    """Each document's errors under `config` with deferred caches, and every token's depth.

    counts: how many of the observed tokens are of each document.
    """
    depths = exits_of(seen, config)
    parts = np.split(wrong_at(seen, depths), np.cumsum(counts)[:-1])
    pairs = [(int(part.sum()), len(part)) for part in parts if len(part)]
    errors, tokens = zip(*pairs, strict=True)
    return Losses(np.array(errors), np.array(tokens)), depths


def judge(seen: Observations, engine_times: EngineTimes, config: ExitConfig) -> Candidate:
    """What the observations predict of `config`."""
    depths = exits_of(seen, config)
    times = engine_times.of(depths, count_checks(config, depths), config.kv_fill)
    risk = float(wrong_at(seen, depths).mean())
    return Candidate(config, risk, engine_times.full / float(times.mean()))


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both risk and speed, safest first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.risk, -c.speedup)):
        if not best or candidate.speedup > best[-1].speedup:
            best.append(candidate)
    return best


def _scored(seen: Observations) -> dict[PolicyName, dict[int, Floats]]:
    """By policy and depth, a score that rises with the policy's confidence."""
    scores: dict[PolicyName, dict[int, Floats]] = {}
    if seen.margin:
        scores |= {"margin": seen.margin, "learned": seen.learned}
    if seen.risk:
        scores["probe"] = {depth: -risk for depth, risk in seen.risk.items()}
    return scores


def _stability(seen: Observations) -> Iterator[ExitConfig]:
    for tau in _TAUS:
        for k in (2, 3, 4):
            for ratio in _MIN_RATIOS:
                if k <= seen.num_layers:
                    yield ExitConfig(tau=tau, consecutive_k=k, min_layer_ratio=ratio)


def _cascades(seen: Observations) -> Iterator[ExitConfig]:
    medians = {depth: float(np.median(risk)) for depth, risk in seen.risk.items()}
    for multiple in _MULTIPLES:
        for target in _TARGETS:
            yield ExitConfig(
                policy="cascade",
                thresholds={d: max(m * multiple, 1e-6) for d, m in medians.items()},
                weights=dict.fromkeys(medians, 1.0),
                targets=dict.fromkeys(medians, target),
            )


def _by_thresholds(
    seen: Observations,
    engine_times: EngineTimes,
    kv_fill: KvFill,
    policy: PolicyName,
    scores: dict[int, Floats],
) -> Iterator[ExitConfig]:
    """For each price of an error the thresholds that make errors and time cheapest together."""
    check = engine_times.exit if policy != "probe" else 0.0
    step = engine_times.layer - engine_times.skipped(kv_fill)
    for price in _PRICES:
        thresholds = _optimize(seen, step, scores, check, float(price) * engine_times.full)
        if not thresholds:
            continue
        for scale in _SCALES:
            yield ExitConfig(policy=policy, thresholds=_scaled(thresholds, policy, scale))


def _scaled(thresholds: dict[int, float], policy: PolicyName, scale: float) -> dict[int, float]:
    """Thresholds that let through `scale` times the doubt, to six digits so files are legible.

    Doubt is the risk itself, or what margin or probability lack of 1.
    """
    if policy == "probe":
        doubts = {depth: max(-value * scale, 1e-6) for depth, value in thresholds.items()}
    else:
        doubts = {d: min(1.0, max(0.0, 1 - (1 - v) * scale)) for d, v in thresholds.items()}
    return {depth: float(f"{value:.6g}") for depth, value in doubts.items()}


def _optimize(
    seen: Observations, step: float, scores: dict[int, Floats], check: float, price: float
) -> dict[int, float]:
    """Thresholds by depth, found from the deepest up, each given the others; some sweeps of it.

    A token reaching depth d may exit there at a known cost or go on at the cost that the deeper
    thresholds give it; sorted by score, the best threshold is where the sum of the differences is
    least. Depths that do not pay for asking are left out. step: what a layer saved saves.
    """
    depths = sorted(scores)
    thresholds: dict[int, float] = dict.fromkeys(depths, math.inf)
    wrong = {depth: seen.wrong(depth) for depth in depths}
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
    """The threshold whose exits minimise the sum of `gains`, infinity if none pays its checks."""
    here = scores[reaching]
    if not len(here):
        return math.inf
    order = np.argsort(-here)
    sums = np.cumsum(gains[reaching][order])
    least = int(np.argmin(sums))
    if sums[least] + check * len(here) >= 0:
        return math.inf
    return float(here[order[least]])

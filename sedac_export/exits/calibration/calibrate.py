"""Choose an exit setting on some documents and certify it on others."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sedac_export.bundle import Bundle
from sedac_export.bundle.edit import edited_bundle, write_config
from sedac_export.bundle.exit_config import Certificate, ExitConfig
from sedac_export.console import StageProgress
from sedac_export.errors import SedacError
from sedac_export.exits.calibration.engine_times import EngineTimes, measure_engine_times
from sedac_export.exits.calibration.generation_speed import measure_generation
from sedac_export.exits.calibration.learn_then_test import Losses, check_enough, count_certified
from sedac_export.exits.calibration.observe import (
    Observations,
    count_losses,
    full_tokens,
    observe,
)
from sedac_export.exits.calibration.search import (
    Candidate,
    Depths,
    count_checks,
    losses_of,
    pareto,
    search,
)
from sedac_export.exits.calibration.wall_clock import measure_speedup
from sedac_export.exits.replay.documents import (
    Document,
    data_digest,
    split_documents,
    window_length,
)
from sedac_export.exits.replay.replay import Replay, require_early_depths
from sedac_runtime.choices import CalibrationMode, KvFill

# what part of the risk the settings to certify spend where they were searched, safest first; few
# where each takes a replay
_LADDERS: dict[KvFill, Sequence[float]] = {
    "propagate": (0.1, 0.5, 0.65, 0.8, 0.9, 0.97),
    "defer": tuple(step / 20 for step in range(2, 25)),
}
# a setting that gains less than this is not worth its exits
_LEAST_GAIN = 1.01
_SEARCH_SHARE = 0.45


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate. Risks, confidence and min_speedup as numbers, not percent."""

    directory: Path
    documents: Sequence[Document]
    mode: CalibrationMode = "balanced"
    max_risk: float = 0.01
    confidence: float = 0.95
    min_speedup: float | None = None
    kv_fill: KvFill = "defer"


@dataclass(frozen=True)
class CalibrationStep:
    """One setting of the sequence on the certifying documents."""

    candidate: Candidate
    losses: Losses
    layer_ratio: float
    speedup: float

    def risk_bound(self, request: CalibrationRequest) -> float:
        """The bound on its risk where it is certified."""
        return min(self.losses.upper_bound(request.confidence), request.max_risk)


@dataclass(frozen=True)
class Calibrated:
    """What was tested, in order, and the configuration that was written."""

    config: ExitConfig
    steps: list[CalibrationStep]


class CalibrationRun:
    """A bundle on the documents that choose a setting, and on others that certify it.

    Documents are run at full depth once, whatever risks they are asked about. Raises SedacError
    when `directory` is no bundle or there are too few documents.
    """

    def __init__(
        self,
        directory: Path,
        documents: Sequence[Document],
        progress: StageProgress = lambda *_: None,
    ) -> None:
        self.bundle = Bundle.open(directory)
        shares = (_SEARCH_SHARE, 1 - _SEARCH_SHARE)
        self.searching, self.certifying = split_documents(documents, shares)
        self.progress = progress

    @cached_property
    def replay(self) -> Replay:
        """Its engines."""
        return Replay(self.bundle)

    @cached_property
    def engine_times(self) -> EngineTimes:
        """What they cost."""
        return measure_engine_times(self.replay)

    @cached_property
    def searched(self) -> Observations:
        """What exits say of the documents that choose a setting."""
        return observe(self.replay, self.searching, lambda *done: self.progress("search", *done))

    @cached_property
    def certified(self) -> Observations:
        """What exits say of the documents that certify it."""
        return observe(self.replay, self.certifying, lambda *done: self.progress("certify", *done))


def calibrate(request: CalibrationRequest, progress: StageProgress = lambda *_: None) -> Calibrated:
    """Search, certify, time, and write sedac_config.json. Nothing is written unless certified.

    Raises SedacError when the data are too few, and when no setting is certified: it says how
    close the best came.
    """
    _check(request)
    run = CalibrationRun(request.directory, request.documents, progress)
    step, steps = certify(request, run)
    config = _with_certificate(request, run, step)
    write_config(request.directory, config.to_json())
    return Calibrated(config, steps)


def certify(
    request: CalibrationRequest, run: CalibrationRun
) -> tuple[CalibrationStep, list[CalibrationStep]]:
    """The certified setting that the request asks for, and all that were tested, in order.

    Raises SedacError when no token can exit early, the data are too few, and when no setting is
    certified.
    """
    require_early_depths(run.bundle.manifest, run.bundle.directory)
    _check_size(request, run.certifying)
    ladder = _choose(request, run)
    steps = _test(request, run, ladder)
    certified = count_certified(
        [step.losses for step in steps], request.max_risk, request.confidence
    )
    logger.info("%d of %d settings certified, safest first", certified, len(steps))
    if certified == 0:
        raise SedacError(_refusal(request, steps))
    return _best(request, steps[:certified]), steps


def _choose(request: CalibrationRequest, run: CalibrationRun) -> list[Candidate]:
    """The settings to certify, safest first, all of the policy that is fastest at the risk.

    Signals are observed with full depth's caches, which deferred tokens leave too. Propagated ones
    change what later tokens see and with it the risk: one replay tells by how much, and settings
    are taken for the corrected risk.
    """
    replay, seen = run.replay, run.searched
    front = pareto(search(seen, run.engine_times, request.kv_fill))
    front = [c for c in front if c.speedup >= _LEAST_GAIN]
    if not front:
        raise SedacError(
            "no setting of any policy is faster than full depth; train probes with more data, or"
            " use a model trained for early exits"
        )
    trial = max((c for c in front if c.risk <= request.max_risk), key=_speed, default=front[0])
    inflation = 1.0
    if request.kv_fill == "propagate":
        full = seen.full_by_document(run.searching, window_length(replay.manifest))
        losses, _ = count_losses(replay, run.searching, full, trial.config.policy_settings())
        # one token more of both, for a trial that made no error
        one = 1 / float(losses.tokens.sum())
        inflation = max(1.0, (losses.risk + one) / (trial.risk + one))
    same = [c for c in front if c.config.policy == trial.config.policy]
    chosen: list[Candidate] = []
    for share in _LADDERS[request.kv_fill]:
        within = [c for c in same if c.risk * inflation <= share * request.max_risk]
        best = max(within, key=_speed, default=same[0])
        if best not in chosen:
            chosen.append(best)
    return sorted(chosen, key=lambda c: c.risk)


def _test(
    request: CalibrationRequest, run: CalibrationRun, ladder: Sequence[Candidate]
) -> list[CalibrationStep]:
    """The ladder on the certifying documents, up to the first that fails."""
    measure = _measurer(request, run)
    engine_times = run.engine_times
    steps: list[CalibrationStep] = []
    for candidate in ladder:
        losses, depths = measure(candidate)
        checks = count_checks(candidate.config, depths)
        ratio = run.replay.num_layers / float(depths.mean())
        speedup = engine_times.full / float(engine_times.of(depths, checks, request.kv_fill).mean())
        steps.append(CalibrationStep(candidate, losses, ratio, speedup))
        if not count_certified([losses], request.max_risk, request.confidence):
            break
    return steps


def _measurer(
    request: CalibrationRequest, run: CalibrationRun
) -> Callable[[Candidate], tuple[Losses, Depths]]:
    """What gives a candidate's losses and depths on the certifying documents.

    Deferred tokens leave full depth's caches, so one observation serves all candidates; with
    propagated ones each has to be replayed.
    """
    replay, documents = run.replay, run.certifying
    if request.kv_fill == "defer":
        seen = run.certified
        counts = seen.counts(documents, window_length(replay.manifest))
        return lambda candidate: losses_of(seen, counts, candidate.config)
    full = full_tokens(replay, documents, lambda *done: run.progress("certify", *done))
    return lambda candidate: count_losses(
        replay, documents, full, candidate.config.policy_settings()
    )


def _best(request: CalibrationRequest, steps: Sequence[CalibrationStep]) -> CalibrationStep:
    """The certified step that the mode asks for."""
    if request.mode == "quality":
        wanted = request.min_speedup or _LEAST_GAIN
        fast = [step for step in steps if step.speedup >= wanted]
        return min(fast or steps[-1:], key=lambda step: step.losses.risk)
    if request.mode == "speed":
        return max(steps, key=lambda step: step.speedup)
    return max(steps, key=lambda step: step.speedup * (1 - step.losses.risk))


def _with_certificate(
    request: CalibrationRequest, run: CalibrationRun, step: CalibrationStep
) -> ExitConfig:
    """The step's configuration with its certificate. Raises SedacError when it is too slow.

    A drafter changes nothing about the risk: tokens come from full depth instead of from an exit,
    never the other way round.
    """
    config, documents = step.candidate.config, run.certifying
    speedup = time_config(run.bundle, config, documents)
    if request.min_speedup is not None and speedup < request.min_speedup:
        raise SedacError(
            f"the fastest certified setting is {speedup:.2f}x full depth along given text, below"
            f" --min-speedup {request.min_speedup:g}; nothing was written"
        )
    drafter, timed = measure_generation(
        run.replay, config, documents, lambda *done: run.progress("time", *done)
    )
    config = config.model_copy(update={"drafter": drafter})
    certificate = Certificate(
        setting=config.certifiable(run.bundle.files.engines_sha256),
        max_risk=request.max_risk,
        confidence=request.confidence,
        risk_bound=step.risk_bound(request),
        observed_risk=step.losses.risk,
        tokens=int(step.losses.tokens.sum()),
        documents=len(step.losses.tokens),
        data_sha256=data_digest(documents),
        speedup=speedup,
        layer_ratio=step.layer_ratio,
        mode=request.mode,
        generation=timed,
    )
    return config.model_copy(update={"certificate": certificate})


def time_config(bundle: Bundle, config: ExitConfig, documents: Sequence[Document]) -> float:
    """Wall-clock speed of `config` against full depth, timed on a copy of the bundle."""
    with edited_bundle(bundle, keep=False) as copy:
        write_config(copy, config.to_json())
        return measure_speedup(copy, documents)


def _refusal(request: CalibrationRequest, steps: Sequence[CalibrationStep]) -> str:
    losses = steps[0].losses
    bound = losses.upper_bound(request.confidence)
    return (
        f"no setting could be certified at --max-risk {request.max_risk:g}: the closest,"
        f" policy {steps[0].candidate.config.policy} at layer ratio {steps[0].layer_ratio:.3f}, has"
        f" risk {losses.risk:.4f} on {int(losses.tokens.sum())} tokens, bounded by {bound:.4f};"
        " give more --data or a higher --max-risk"
    )


def _check(request: CalibrationRequest) -> None:
    for name, value in (("--max-risk", request.max_risk), ("--confidence", request.confidence)):
        if not 0 < value < 1:
            raise SedacError(f"{name} {value} is out of range: above 0 and below 1")
    if request.min_speedup is not None and not 0 < request.min_speedup < float("inf"):
        raise SedacError(f"--min-speedup {request.min_speedup} is out of range: above 0")


def _check_size(request: CalibrationRequest, documents: Sequence[Document]) -> None:
    """Raise SedacError before the work when the data cannot certify anything."""
    counts = np.array([len(document.tokens) for document in documents])
    check_enough(Losses(np.zeros_like(counts), counts), request.max_risk, request.confidence)


def _speed(candidate: Candidate) -> float:
    return candidate.speedup

"""Measure what each mode gives on a bundle, and say which to use: `sedac-export advise`."""

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from sedac_export.advice.recommendation import AdviceRow, Recommendation, recommend
from sedac_export.advice.speedup import speedup
from sedac_export.advice.time_modes import Continuation, TimedMode, time_modes
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.bundle.manifest import Manifest
from sedac_export.console import StageProgress
from sedac_export.errors import SedacError
from sedac_export.exits.calibration.calibrate import CalibrationRequest, CalibrationRun, certify
from sedac_export.exits.calibration.generation_speed import (
    agreement,
    cut_prompts,
    decoding_setups,
)
from sedac_export.exits.replay.documents import Document
from sedac_export.exits.replay.replay import Replay, early_depths, require_single_layers
from sedac_runtime import SedacModel
from sedac_runtime._core import DecodingMode, DecodingSetting
from sedac_runtime.choices import Drafter, LosslessDrafter, Mode
from sedac_runtime.library import default_threads

RISKS = (0.01, 0.05)


@dataclass(frozen=True)
class CertifiedExit:
    """What calibrate certifies at `max_risk`, on the text that is not searched.

    layer_ratio and observed_risk are along given text. refusal: why nothing is certified; the
    other fields are None then.
    """

    max_risk: float
    config: ExitConfig | None = None
    risk_bound: float | None = None
    observed_risk: float | None = None
    tokens: int | None = None
    documents: int | None = None
    layer_ratio: float | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Advice:
    """The report. untried: what a bundle without trained parts could gain, and how to find out."""

    bundle: str
    model: str
    machine: str
    precision: str
    prompts: int
    confidence: float
    recommendation: Recommendation
    rows: list[AdviceRow]
    exits: list[CertifiedExit]
    commands: list[str]
    untried: list[str]

    def to_json(self) -> str:
        """The command's --json."""
        facts = asdict(self)
        for own, row in zip(facts["exits"], self.exits, strict=True):
            own["config"] = row.config and row.config.model_dump(exclude_none=True)
        facts["sentence"] = facts.pop("recommendation")["sentence"]
        return json.dumps(facts)


def advise(
    directory: Path,
    documents: Sequence[Document],
    prompts: int,
    progress: StageProgress = lambda *_: None,
) -> Advice:
    """Certify exits, time all modes after `prompts` prompts cut from `documents`, and recommend.

    Prompts come from the documents that certify, which no setting was chosen on. The runtime takes
    all processors, as it does by default.

    Raises SedacError when there are fewer than two documents or prompts, or the runtime refuses the
    bundle.
    """
    if prompts < 2:
        raise SedacError(f"--prompts {prompts} is out of range: 2 or more")
    run = CalibrationRun(directory, documents, progress)
    manifest = run.bundle.manifest
    require_single_layers(manifest, directory)
    exits = [_certified(run, risk) for risk in RISKS]
    model = SedacModel.from_pretrained(directory)
    contenders = list(_contenders(manifest, exits))
    starts = cut_prompts(run.certifying, manifest.max_cache_length, prompts)
    timed = time_modes(
        model,
        {contender.name: contender.setting for contender in contenders},
        starts,
        lambda *done: progress("time", *done),
    )
    rows = _rows(run.replay, contenders, timed)
    recommendation = recommend(rows, RISKS)
    return Advice(
        bundle=str(directory),
        model=manifest.model.name,
        machine=f"{_processor()}, {default_threads()} threads",
        precision=manifest.precision,
        prompts=len(starts),
        confidence=_request(run, RISKS[0]).confidence,
        recommendation=recommendation,
        rows=rows,
        exits=exits,
        commands=list(_commands(directory, recommendation)),
        untried=list(_untried(directory, manifest)),
    )


@dataclass(frozen=True)
class _Contender:
    mode: Mode
    drafter: Drafter
    setting: DecodingSetting
    max_risk: float | None = None

    @property
    def name(self) -> str:
        return f"{self.mode} {self.drafter} {self.max_risk}"


def _certified(run: CalibrationRun, risk: float) -> CertifiedExit:
    request = _request(run, risk)
    try:
        step, _ = certify(request, run)
    except SedacError as error:
        return CertifiedExit(risk, refusal=str(error))
    return CertifiedExit(
        risk,
        step.candidate.config,
        step.risk_bound(request),
        step.losses.risk,
        int(step.losses.tokens.sum()),
        len(step.losses.tokens),
        step.layer_ratio,
    )


def _request(run: CalibrationRun, risk: float) -> CalibrationRequest:
    """What `sedac-export calibrate --max-risk` would be asked."""
    return CalibrationRequest(run.bundle.directory, run.certifying, max_risk=risk)


def _contenders(manifest: Manifest, exits: Sequence[CertifiedExit]) -> Iterator[_Contender]:
    """Full depth, lossless mode with each drafter of the bundle, and the certified exits."""
    yield _Contender("full", "none", DecodingSetting(DecodingMode.full()))
    for drafter in get_args(LosslessDrafter):
        if drafter != "trained" or manifest.drafter is not None:
            setting = DecodingSetting(DecodingMode.lossless(drafter))
            yield _Contender("lossless", drafter, setting)
    for found in exits:
        if found.config is not None:
            yield from _exits(found.max_risk, found.config)


def _exits(risk: float, config: ExitConfig) -> Iterator[_Contender]:
    """The setting with each drafter that calibrate weighs."""
    policy = config.policy_settings()
    for mode, name in decoding_setups(config):
        if mode == "exit":
            drafter: LosslessDrafter | None = None if name == "none" else name
            decoding = DecodingMode.exit(policy, drafter)
            yield _Contender("exit", name, DecodingSetting(decoding, config.kv_fill), risk)


def _rows(
    replay: Replay, contenders: Sequence[_Contender], timed: dict[str, TimedMode]
) -> list[AdviceRow]:
    full = timed[contenders[0].name]
    known: dict[tuple[tuple[int, ...], ...], float] = {}
    rows = []
    for contender in contenders:
        measured = timed[contender.name]
        rows.append(
            AdviceRow(
                contender.mode,
                contender.drafter,
                contender.max_risk,
                float(np.median(measured.milliseconds)),
                speedup(full.milliseconds, measured.milliseconds),
                _agreement(replay, measured.texts, known),
                replay.num_layers / measured.mean_exit_layer,
            )
        )
    return rows


def _agreement(
    replay: Replay,
    texts: Sequence[Continuation],
    known: dict[tuple[tuple[int, ...], ...], float],
) -> float:
    """Share of tokens that are full depth's; texts that several settings gave are run once."""
    shares = []
    for prompt, tokens in texts:
        key = (tuple(prompt), tuple(tokens))
        if key not in known:
            known[key] = agreement(replay, [(prompt, tokens)])
        shares.append(known[key])
    return float(np.mean(shares))


def _commands(directory: Path, recommendation: Recommendation) -> Iterator[str]:
    """What to run to follow the recommendation."""
    chosen = recommendation.chosen
    run = f"sedac-runtime generate --engines {directory} --mode"
    drafter = "" if chosen.drafter == "none" else f" --drafter {chosen.drafter}"
    yield f"{run} {chosen.mode}{drafter} --prompt ..."
    for row in recommendation.exits:
        calibrate = f"sedac-export calibrate {directory} --data ... --max-risk {row.max_risk:g}"
        yield f"{calibrate} && {run} exit --prompt ..."


def _untried(directory: Path, manifest: Manifest) -> Iterator[str]:
    """What the bundle lacks, with the command that adds it; advise measures it afterwards."""
    if manifest.drafter is None:
        yield (
            "a trained drafter: sedac-export train-drafter MODEL --self-distill 20000 --output"
            f" drafter --bundle {directory}"
        )
    if early_depths(manifest) and not manifest.engines.exits:
        yield (
            f"trained exits: sedac-export train-exits {directory} --data ... (other texts than"
            " these); train-probes if the model was trained for exits"
        )


def _processor() -> str:
    """The processor's name, or its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

"""Settings of every policy on the same texts: speed, and what it costs in quality."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedac_export.bundle import Bundle
from sedac_export.bundle.certified import read_certification
from sedac_export.bundle.exit_config import ExitConfig, read_exit_config
from sedac_export.console import StageProgress
from sedac_export.errors import SedacError
from sedac_export.exits.calibration.calibrate import time_config
from sedac_export.exits.replay.documents import Document, window_length
from sedac_export.exits.replay.probes_file import median_risks
from sedac_export.exits.replay.replay import Replay, Trace
from sedac_runtime.choices import KvFill, PolicyName
from sedac_runtime.tolerance import tolerance_note

# the original SEDAC's grid
TAUS = (0.99, 0.98, 0.97, 0.95, 0.90)
KS = (2, 3)
MULTIPLES = (0.5, 0.75, 1.0, 1.5, 2.0)
MARGINS = (0.6, 0.7, 0.8, 0.9)
LEARNED = (0.9, 0.95, 0.97, 0.99)
HIGH_RISK_QUANTILE = 0.75


@dataclass(frozen=True)
class ReportRow:
    """One setting. speedup is wall-clock against full depth, layer_ratio the layers' ratio.

    agreement: share of tokens that are full depth's; perplexity_change: relative, 0 is none;
    exit_rate: share of tokens that exit early; high_risk_rate: share of tokens that exit early
    although their full-depth entropy is above its 75th percentile; certified: the bundle's own
    setting, and its certificate holds.
    """

    policy: str
    settings: dict[str, object]
    kv_fill: KvFill
    mean_exit_layer: float
    layer_ratio: float
    speedup: float
    agreement: float
    perplexity_change: float
    exit_rate: float
    high_risk_rate: float
    certified: bool


@dataclass(frozen=True)
class Report:
    """Rows, the bundle's own first, and of the own setting every token's depth and a text.

    certification: what the runtime says is certified of the bundle's own setting. tolerance_note:
    what to say of how far the bundle's engines may be from the model.
    """

    model: str
    num_layers: int
    tokens: int
    certification: str
    rows: list[ReportRow]
    depths: npt.NDArray[np.int64]
    text: list[tuple[int, int]]
    tolerance_note: str | None

    def to_json(self) -> str:
        """{"certification", "tolerance_note", "rows": [...]}, the command's --json."""
        facts = {"certification": self.certification, "tolerance_note": self.tolerance_note}
        return json.dumps(facts | {"rows": [asdict(row) for row in self.rows]})


def make_report(
    directory: Path,
    documents: Sequence[Document],
    full: bool,
    kv_fill: KvFill = "defer",
    progress: StageProgress = lambda *_: None,
) -> Report:
    """Replay and time the bundle's own setting, with `full` the whole grid too, under `kv_fill`.

    Raises SedacError when the bundle's configuration cannot be used, or no document has two tokens.
    """
    bundle = Bundle.open(directory)
    manifest = bundle.manifest
    own = read_exit_config(directory)
    own.check_bundle(manifest)
    certification = read_certification(bundle)
    replay = Replay(bundle)
    windows = [w for d in documents for w in d.windows(window_length(manifest))]
    if not windows:
        raise SedacError("no document has two tokens or more; give more --data")
    reference = Trace.join([_counted(replay.run(window.tokens)) for window in windows])
    rows, depths = [], np.empty(0, dtype=np.int64)
    others = grid(bundle) if full else []
    configs = [own, *(config.model_copy(update={"kv_fill": kv_fill}) for config in others)]
    for number, config in enumerate(configs):
        progress("report", number, len(configs))
        policy = config.policy_settings()
        runs = (replay.run(w.tokens, policy, kv_fill=config.kv_fill) for w in windows)
        trace = Trace.join([_counted(run) for run in runs])
        speedup = time_config(bundle, config, documents)
        certified = number == 0 and certification.certified
        rows.append(_row(config, trace, reference, speedup, replay.num_layers, certified))
        depths = trace.depths if number == 0 else depths
    progress("report", len(configs), len(configs))
    text = list(zip(windows[0].tokens[1:].tolist(), depths.tolist(), strict=False))
    return Report(
        model=manifest.model.name,
        num_layers=replay.num_layers,
        tokens=len(depths),
        certification=certification.sentence,
        rows=rows,
        depths=depths,
        text=text,
        tolerance_note=tolerance_note(manifest.tolerance),
    )


def grid(bundle: Bundle) -> list[ExitConfig]:
    """The original grid of V7 and V6, and thresholds of the policies that have trained probes."""
    manifest = bundle.manifest
    layers = manifest.model.num_layers
    configs = [
        ExitConfig(tau=tau, consecutive_k=k, min_layer_ratio=0.2)
        for tau in TAUS
        for k in KS
        if k <= layers
    ]
    medians = median_risks(bundle)
    for multiple in MULTIPLES if medians else ():
        thresholds = {depth: median * multiple for depth, median in medians.items()}
        configs.append(ExitConfig(policy="probe", thresholds=thresholds))
    if medians:
        ones = dict.fromkeys(medians, 1.0)
        configs.append(
            ExitConfig(
                policy="cascade", thresholds=medians, weights=ones, targets=dict.fromkeys(ones, 0.5)
            )
        )
    exits = [entry.depth for entry in manifest.engines.exits]
    scored: dict[PolicyName, tuple[float, ...]] = {"margin": MARGINS, "learned": LEARNED}
    return configs + [
        ExitConfig(policy=policy, thresholds=dict.fromkeys(exits, value))
        for policy, values in scored.items()
        for value in (values if exits else ())
    ]


def _counted(trace: Trace) -> Trace:
    """The trace without its first token, which always runs at full depth."""
    return Trace(*(values[1:] for values in vars(trace).values()))


def _row(
    config: ExitConfig, trace: Trace, full: Trace, speedup: float, layers: int, certified: bool
) -> ReportRow:
    early = trace.exits < layers
    threshold = np.quantile(full.entropies, HIGH_RISK_QUANTILE)
    loss, reference = np.nanmean(trace.losses), np.nanmean(full.losses)
    depth = float(trace.depths.mean())
    return ReportRow(
        policy=config.policy,
        settings=config.settings(),
        kv_fill=config.kv_fill,
        mean_exit_layer=depth,
        layer_ratio=layers / depth,
        speedup=speedup,
        agreement=float((trace.tokens == full.tokens).mean()),
        perplexity_change=float(np.expm1(loss - reference)),
        exit_rate=float(early.mean()),
        high_risk_rate=float((early & (full.entropies > threshold)).mean()),
        certified=certified,
    )

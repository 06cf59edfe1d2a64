"""The commands about exits: collect, train-probes, train-exits, calibrate, report."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sedac_export.bundle.staging import claimed
from sedac_export.cli.outputs import check_directory
from sedac_export.cli.progress import progress_bar
from sedac_export.console import console
from sedac_export.errors import SedacError

DATA = "--data"

BundleArgument = Annotated[Path, typer.Argument(help="Directory of the bundle.")]
Data = Annotated[
    list[Path], typer.Option(DATA, help="UTF-8 texts, or directories of them; takes several.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
ExitLayers = Annotated[
    str | None,
    typer.Option(help="Depths with exit engines, such as 3,6,9. [default: up to 8, evenly spaced]"),
]
ProbeLayers = Annotated[
    str | None,
    typer.Option(
        help="Depths with entropy probes. [default: SEDAC_V6_LAYERS, or 1/6, 1/3 and 1/2]"
    ),
]

CollectionDirectory = Annotated[
    Path | None,
    typer.Option(
        "--collection", help="Directory for the collected data; an existing one is resumed."
    ),
]
MaxBytes = Annotated[int, typer.Option(help="Maximum size of the collection.")]


class KvFillName(StrEnum):
    """What --kv-fill takes."""

    PROPAGATE = "propagate"
    DEFER = "defer"


class ModeName(StrEnum):
    """What --mode takes."""

    QUALITY = "quality"
    BALANCED = "balanced"
    SPEED = "speed"


def register_exit_commands(app: typer.Typer) -> None:
    """Add the commands to sedac-export."""
    app.command()(collect)
    app.command("train-probes")(train_probes)
    app.command("train-exits")(train_exits)
    app.command()(calibrate)
    app.command()(report)


def spread_data(arguments: list[str]) -> list[str]:
    """Arguments with --data before each of the files that follow one --data."""
    spread: list[str] = []
    inside = False
    for argument in arguments:
        if inside and not argument.startswith("-") and spread[-1] != DATA:
            spread.append(DATA)
        elif argument.startswith("-"):
            inside = argument == DATA
        spread.append(argument)
    return spread


def collect(
    bundle: BundleArgument,
    data: Data,
    output: Annotated[
        Path, typer.Option(help="Directory of the collection; an interrupted one is resumed.")
    ],
    exit_layers: ExitLayers = None,
    probe_layers: ProbeLayers = None,
    max_bytes: MaxBytes = 4_000_000_000,
) -> None:
    """Run the chain over texts and store training data for probes, per token and depth."""
    from sedac_export.exits.replay.replay import Replay, require_early_depths
    from sedac_export.exits.training.collect import collect as run
    from sedac_export.exits.training.collect import left_out
    from sedac_export.exits.training.train_probes import exit_depths

    check_directory(output)
    opened, documents = _read(bundle, data)
    require_early_depths(opened.manifest, bundle)
    exits = exit_depths(opened.manifest, parse_depths("--exit-layers", exit_layers))
    depths = sorted({*exits, *_probe_depths(opened, probe_layers)})
    with progress_bar("collect") as update:
        collection = run(
            Replay(opened),
            documents,
            output,
            depths,
            max_bytes,
            lambda done, total: update("collect", done, total),
        )
    left = left_out(collection, documents)
    console.print(
        f"{output}: {collection.tokens} tokens of {len(collection.documents)} documents,"
        f" {collection.tokens * collection.bytes_per_token / 1e6:.0f} MB"
        + (f"; {left} documents left out (--max-bytes)" if left else ""),
        highlight=False,
    )


def train_probes(
    bundle: BundleArgument,
    data: Data,
    exit_layers: ExitLayers = None,
    probe_layers: ProbeLayers = None,
    collection: CollectionDirectory = None,
    max_bytes: MaxBytes = 4_000_000_000,
    lens: Annotated[
        bool, typer.Option("--lens", help="Also fit a tuned lens for each exit depth.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fit entropy probes, learned probes and lenses, and add them to the bundle.

    For models that were trained for exits; train-exits is for others.
    """
    depths = parse_depths("--exit-layers", exit_layers)
    exits = depths, "--exit-layers"
    kinds = ["affine"] if lens else []
    trained = _train(bundle, data, exits, probe_layers, collection, max_bytes, kinds)
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in trained.rows]}))
        return
    _print_trained(bundle, trained)


def train_exits(
    bundle: BundleArgument,
    data: Data,
    depths: Annotated[
        str | None,
        typer.Option(help="Exit depths, such as 3,6,9. [default: up to 8, evenly spaced]"),
    ] = None,
    probe_layers: ProbeLayers = None,
    collection: CollectionDirectory = None,
    max_bytes: MaxBytes = 4_000_000_000,
    as_json: AsJson = False,
) -> None:
    """Fit exits to a model that was not trained for them: adapters, and probes through them.

    The model stays as it is. A depth gets an MLP (exit adapter) or an affine map (tuned lens)
    before the head, whichever comes closer to full depth on held-out texts, or nothing where
    neither helps. For models trained for exits, and for the cuda backend, use train-probes.
    """
    from sedac_export.bundle import Bundle
    from sedac_export.exits.calibration.engine_times import measure_engine_times
    from sedac_export.exits.replay.replay import Replay

    exits = parse_depths("--depths", depths), "--depths"
    kinds = ["affine", "mlp"]
    trained = _train(bundle, data, exits, probe_layers, collection, max_bytes, kinds)
    times = measure_engine_times(Replay(Bundle.open(bundle)))
    shares = {"lens": times.lens / times.layer, "exit": times.exit / times.layer}
    if as_json:
        print(
            json.dumps({"rows": [asdict(row) for row in trained.rows], "share_of_a_layer": shares})
        )
        return
    _print_trained(bundle, trained)
    console.print(
        f"time of one token as a share of a layer's: lens {shares['lens']:.2f}, exit engine with it"
        f" {shares['exit']:.2f}",
        highlight=False,
    )


def _train(
    bundle: Path,
    data: list[Path],
    exits: tuple[list[int] | None, str],
    probe_layers: str | None,
    collection: Path | None,
    max_bytes: int,
    lenses: Sequence[Any],
) -> Any:
    """Train lenses of the kinds `lenses`, and probes, at the depths asked for by an option."""
    from sedac_export.exits.replay.replay import require_early_depths
    from sedac_export.exits.training import train_probes as training

    if collection is not None:
        check_directory(collection, "--collection")
    with claimed(bundle), progress_bar("collect", "train") as update:
        opened, documents = _read(bundle, data)
        require_early_depths(opened.manifest, bundle)
        trained = training.train_probes(
            bundle,
            documents,
            training.exit_depths(opened.manifest, *exits),
            _probe_depths(opened, probe_layers),
            collection,
            max_bytes,
            update,
            lenses,
        )
    if trained.left_out:
        console.print(
            f"{bundle}: {trained.left_out} of {len(documents)} documents left out (--max-bytes)",
            highlight=False,
        )
    return trained


def _probe_depths(opened: Any, probe_layers: str | None) -> list[int]:
    """The depths of entropy probes that the option, the original's variable or nobody asks for."""
    from sedac_export.exits.training.train_probes import probe_depths

    asked = probe_layers or os.environ.get("SEDAC_V6_LAYERS")
    return probe_depths(opened.manifest, parse_depths("--probe-layers", asked))


def _print_trained(bundle: Path, trained: Any) -> None:
    """The trained rows as tables, lenses in a separate one."""
    table = Table("depth", "agreement", "AUC margin", "AUC learned", "V6 Huber loss")
    lenses = Table("depth", "lens", "KL", "with lens", "agreement", "with lens", "MB", "")
    for row in trained.rows:
        shares = (row.agreement, row.margin, row.learned)
        numbers = ["" if share is None else f"{share:.3f}" for share in shares]
        loss = "" if row.risk_loss is None else f"{row.risk_loss:.4f}"
        table.add_row(str(row.depth), *numbers, loss)
        for kind, found in (("affine", row.lens), ("adapter", row.adapter)):
            if found is None:
                continue
            values = (found.kl, found.lens_kl, found.agreement, found.lens_agreement)
            shown = [f"{value:.3f}" for value in values]
            state = "kept" if found.kept else "not kept"
            lenses.add_row(str(row.depth), kind, *shown, f"{found.bytes / 1e6:.2f}", state)
    for shown_table in (lenses, table) if lenses.row_count else (table,):
        Console().print(shown_table)
    console.print(
        f"{bundle}: exit engines with {len(trained.tokens)} frequent tokens; figures are of"
        " documents that were held out; the exit configuration is the default again and certifies"
        " nothing: calibrate to set thresholds",
        highlight=False,
    )


def calibrate(
    bundle: BundleArgument,
    data: Data,
    mode: Annotated[
        ModeName,
        typer.Option(
            help="quality: minimum risk; balanced: maximum speed x (1 - risk); speed: maximum"
            " speed."
        ),
    ] = ModeName.BALANCED,
    max_risk: Annotated[
        float, typer.Option(help="Maximum share of tokens that differ from full depth's.")
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="Confidence of the bound.")] = 0.95,
    min_speedup: Annotated[
        float | None, typer.Option(help="Minimum speedup along given text; refuse exits below it.")
    ] = None,
    kv_fill: Annotated[
        KvFillName, typer.Option(help="KV backfill of skipped layers; defer is exact.")
    ] = KvFillName.DEFER,
    as_json: AsJson = False,
) -> None:
    """Choose an exit policy and thresholds, certify their risk, and write sedac_config.json."""
    from sedac_export.bundle.certified import read_certification
    from sedac_export.exits.calibration import calibrate as calibration

    with claimed(bundle), progress_bar("search", "certify", "time") as update:
        opened, documents = _read(bundle, data)
        request = calibration.CalibrationRequest(
            bundle, documents, mode.value, max_risk, confidence, min_speedup, kv_fill.value
        )
        result = calibration.calibrate(request, update)
    if as_json:
        print(json.dumps(result.config.model_dump(exclude_none=True)))
        return
    certificate = result.config.certificate
    assert certificate is not None
    generation = certificate.generation
    console.print(
        f"{bundle}: policy {result.config.policy}, {result.config.settings()}, drafter"
        f" {certificate.setting.drafter}\n"
        f"{read_certification(opened).sentence}\n"
        f"observed risk {certificate.observed_risk:.4f}, layer ratio"
        f" {certificate.layer_ratio:.3f}, wall-clock speed {certificate.speedup:.2f}x full depth"
        " along given text\n"
        f"generating {generation.speedup:.2f}x full depth,"
        f" {generation.speedup_without_drafter:.2f}x without drafter; lossless mode"
        f" {generation.lossless_speedup:.2f}x; {generation.agreement:.2%} of {generation.tokens}"
        " generated tokens are full depth's",
        highlight=False,
    )


def report(
    bundle: BundleArgument,
    data: Data,
    full: Annotated[
        bool, typer.Option("--full", help="Measure a grid of policies, not only the bundle's own.")
    ] = False,
    kv_fill: Annotated[
        KvFillName, typer.Option(help="KV backfill in the grid, with --full.")
    ] = KvFillName.DEFER,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for report.html and its plots. [default: BUNDLE-report]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure exits on texts: speed, agreement, perplexity and exit depths."""
    from sedac_export.exits.calibration.exit_report import make_report
    from sedac_export.exits.calibration.exit_report_page import write_report

    _, documents = _read(bundle, data)
    whole = bundle.resolve()  # "." has no name
    place = output or whole.with_name(f"{whole.name}-report")
    check_directory(place)
    with progress_bar("report") as update:
        result = make_report(bundle, documents, full, kv_fill.value, update)
    write_report(result, bundle, place)
    if as_json:
        print(result.to_json())
        return
    table = Table("policy", "exit layer", "layer ratio", "speed", "agreement", "perplexity")
    for row in result.rows:
        table.add_row(
            row.policy,
            f"{row.mean_exit_layer:.2f}",
            f"{row.layer_ratio:.3f}",
            f"{row.speedup:.2f}x",
            f"{100 * row.agreement:.2f} %",
            f"{100 * row.perplexity_change:+.1f} %",
        )
    Console().print(table)
    console.print(f"{result.certification}\nwrote {place / 'report.html'}", highlight=False)


def parse_depths(option: str, text: str | None) -> list[int] | None:
    """Depths such as 3,6,9; None for None. Raises SedacError for anything else."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SedacError(f"{option} {text} is not a list of depths such as 3,6,9") from error


def _read(bundle: Path, data: list[Path]) -> tuple[Any, Any]:
    """The bundle and the documents."""
    from sedac_export.bundle import Bundle
    from sedac_export.exits.replay.documents import read_documents

    opened = Bundle.open(bundle)
    return opened, read_documents(opened, data)

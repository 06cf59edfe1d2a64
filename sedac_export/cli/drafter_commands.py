"""The commands about trained drafters: train-drafter, add-drafter."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sedac_export.cli.exit_commands import DATA, AsJson, BundleArgument
from sedac_export.cli.outputs import check_directory
from sedac_export.cli.progress import progress_bar
from sedac_export.cli.quiet import silence_libraries
from sedac_export.console import console
from sedac_export.errors import SedacError

if TYPE_CHECKING:
    from sedac_export.model.source import ModelSource


class TrainingDevice(StrEnum):
    """What --device takes."""

    CPU = "cpu"
    CUDA = "cuda"


def register_drafter_commands(app: typer.Typer) -> None:
    """Add the commands to sedac-export."""
    app.command("train-drafter")(train_drafter)
    app.command("add-drafter")(add_drafter)


def train_drafter(
    model: Annotated[
        str, typer.Argument(help="A model directory, a .gguf file or a hub id (owner/name).")
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Directory for the drafter, its corpus and report; an interrupted one is resumed."
        ),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            DATA,
            help="UTF-8 texts, or directories of them, whose beginnings the model continues, or is"
            " asked about where it also writes messages; takes several.",
        ),
    ] = None,
    self_distill: Annotated[
        int, typer.Option(help="Messages that the model writes and answers itself.", min=0)
    ] = 0,
    minutes: Annotated[
        float | None,
        typer.Option(help="Time for everything. [default: as long as it takes]", min=0.1),
    ] = None,
    device: Annotated[TrainingDevice, typer.Option(help="Where to train.")] = TrainingDevice.CPU,
    seed: Annotated[int, typer.Option(help="Seed of the corpus and the training.")] = 0,
    bundle: Annotated[
        Path | None, typer.Option(help="A bundle of the model, to add the drafter to.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a drafter on texts that the model writes itself."""
    silence_libraries()
    from sedac_export.bundle import Bundle
    from sedac_export.drafter.add_drafter import check_shape
    from sedac_export.drafter.draft_model import DrafterShape
    from sedac_export.drafter.train_drafter import DrafterRequest, load_model
    from sedac_export.drafter.train_drafter import train_drafter as run

    check_directory(output)
    opened = None if bundle is None else Bundle.open(bundle)
    texts = _read_texts(data or [])
    if not texts and not self_distill:
        raise SedacError("there is nothing to train on; give --self-distill, --data or both")
    with _opened(model) as (source, tokenizer):
        request = DrafterRequest(
            output, source.name, self_distill, texts, minutes, device.value, seed
        )
        loaded = load_model(source.directory, device.value)
        if opened is not None:
            check_shape(opened, DrafterShape.of(loaded))
        with progress_bar("write", "train") as update:
            report = run(loaded, tokenizer, request, update)
    if bundle is not None:
        _add(bundle, output)
    if as_json:
        print(json.dumps(report))
        return
    best = report["best"]
    console.print(
        f"{output}: a drafter of {report['parameters'] / 1e6:.1f} M parameters and"
        f" {report['draft_vocabulary']} tokens, trained on {report['tokens']} tokens;"
        f" {best['tokens_per_round']:.2f} tokens a round on held-out texts",
        highlight=False,
    )
    if bundle is None:
        console.print(f"sedac-export add-drafter BUNDLE {output} makes it part of a bundle")


def add_drafter(
    bundle: BundleArgument,
    drafter: Annotated[
        Path, typer.Argument(help="What train-drafter wrote: its directory, or the file in it.")
    ],
    as_json: AsJson = False,
) -> None:
    """Make a trained drafter part of a bundle."""
    entry = _add(bundle, drafter)
    if as_json:
        print(json.dumps({"bundle": str(bundle), "feature_layers": entry.feature_layers}))
        return
    console.print(
        f"{bundle}: drafts {len(entry.tokens)} tokens; use it with --mode lossless --drafter"
        " trained, or auto",
        highlight=False,
    )


def _add(bundle: Path, drafter: Path) -> Any:
    from sedac_export.drafter.add_drafter import add_drafter as run
    from sedac_export.drafter.drafter_file import DRAFTER

    return run(bundle, drafter / DRAFTER if drafter.is_dir() else drafter)


@contextlib.contextmanager
def _opened(model: str) -> Iterator[tuple["ModelSource", Any]]:
    """The model and its tokenizer. Raises SedacError when it has none."""
    from sedac_export.model.source import opened_model
    from sedac_export.model.tokenizer import load_tokenizer

    def scratch() -> Any:
        return _temporary()

    with opened_model(model, scratch) as source:
        tokenizer = source.tokenizer or load_tokenizer(source.directory)
        if tokenizer is None:
            raise SedacError(f"{model} has no tokenizer, so it cannot write texts to train on")
        yield source, tokenizer


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def _read_texts(paths: list[Path]) -> tuple[str, ...]:
    """The texts in `paths`. Raises SedacError when one cannot be read."""
    from sedac_export.exits.replay.documents import text_files

    try:
        return tuple(path.read_text(encoding="utf-8") for path in text_files(paths))
    except (OSError, UnicodeDecodeError) as error:
        raise SedacError(f"{DATA}: {error}; give UTF-8 texts") from error

"""The command sedac-export advise."""

from pathlib import Path
from typing import Annotated

import typer

from sedac_export.cli.exit_commands import AsJson, BundleArgument, Data
from sedac_export.cli.outputs import check_file
from sedac_export.cli.progress import progress_bar
from sedac_export.errors import SedacError
from sedac_runtime.terminal import visible


def advise(
    bundle: BundleArgument,
    data: Data,
    prompts: Annotated[
        int, typer.Option(help="Prompts to cut from the texts; more narrow the intervals.")
    ] = 8,
    output: Annotated[
        Path | None, typer.Option(help="File to write the report to, in Markdown.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure every mode on your texts and say which to use, and whether exits pay."""
    from sedac_export.advice.advice_page import advice_page
    from sedac_export.advice.advise import advise as run
    from sedac_export.bundle import Bundle
    from sedac_export.bundle.manifest import MANIFEST
    from sedac_export.exits.replay.documents import read_documents

    if bundle.is_dir() and not (bundle / MANIFEST).exists():
        raise SedacError(
            f"{bundle} is not a bundle; sedac-export build --model {bundle} --output BUNDLE makes"
            " one of a model"
        )
    documents = read_documents(Bundle.open(bundle), data)
    if output is not None:
        check_file(output)
    with progress_bar("search", "certify", "time") as update:
        advice = run(bundle, documents, prompts, update)
    page = advice_page(advice)
    if output is not None:
        output.write_text(page, encoding="utf-8")
    print(advice.to_json() if as_json else visible(page))


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(advise)

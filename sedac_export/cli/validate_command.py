"""The command sedac-export validate."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sedac_export.bundle.target_check import TargetValidation
from sedac_export.cli.progress import progress_bar
from sedac_export.cli.quiet import silence_libraries
from sedac_export.cli.targets import OTHERS, TargetName
from sedac_export.console import StageProgress
from sedac_export.errors import SedacError
from sedac_runtime.flavour import FLAVOURS
from sedac_runtime.terminal import visible


def validate(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    target: Annotated[
        TargetName | None,
        typer.Option(help="Target whose engines to check. [default: all in the bundle]"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Check a bundle's engines for GPUs as far as this host allows.

    The exit code is 0 when all that could be checked held, 3 when the structure of engines did not,
    4 when what they compute disagrees with ONNX Runtime's engines, 5 when it does on the GPU.
    """
    silence_libraries()
    results = []
    for chosen in _validated(bundle, target):
        with progress_bar("validate") as progress:
            results.append(_run(bundle, chosen, progress))
    if as_json:
        targets = {result.target: result.as_json() for result in results}
        passed = all(result.exit_code() == 0 for result in results)
        print(json.dumps({"bundle": str(bundle), "passed": passed, "targets": targets}))
    else:
        for result in results:
            print(visible(result.summary()))
    raise typer.Exit(next((code for result in results if (code := result.exit_code())), 0))


def _validated(directory: Path, target: TargetName | None) -> list[TargetName]:
    """The target that is asked for, or those that the bundle has."""
    from sedac_export.bundle.manifest import read_manifest

    if target is TargetName.ONNXRUNTIME:
        raise SedacError(
            "--target onnxruntime: the build has compared those engines with the original;"
            " sedac-export inspect shows by how much they differ"
        )
    if target is not None:
        return [target]
    manifest = read_manifest(directory)
    held = [TargetName.CUDA] if manifest.cuda is not None else []
    held += [TargetName.ONNXRUNTIME_CUDA] if manifest.onnxruntime_cuda is not None else []
    held += [TargetName(flavour) for flavour in FLAVOURS if flavour in manifest.plans]
    if not held:
        raise SedacError(
            f"{directory} holds no engines for GPUs; add them with"
            f" sedac-export engines {directory} --model MODEL and {OTHERS} as --target"
        )
    return held


def _run(directory: Path, target: TargetName, progress: StageProgress) -> TargetValidation:
    if target is TargetName.CUDA:
        from sedac_export.cuda.validate_chain import validate

        return validate(directory, progress)
    if target is TargetName.ONNXRUNTIME_CUDA:
        from sedac_export.device_graphs.validate_graphs import validate as validate_graphs

        return validate_graphs(directory, progress)
    from sedac_export.tensorrt.validate_plans import validate as validate_plans

    (flavour,) = (name for name in FLAVOURS if TargetName(name) is target)
    return validate_plans(directory, flavour, progress)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(validate)

"""Change a bundle in place: all of a change appears, or nothing of it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sedac_export import manifest as bundle
from sedac_export.exporter import publish, recover, staging_beside
from sedac_export.signature import SIGNATURE, withdraw_signature

# the only files that a change never rewrites, and the only large ones
_WEIGHTS = ".data"


@contextlib.contextmanager
def edited_bundle(directory: Path, keep: bool = True) -> Iterator[Path]:
    """A copy of the bundle to change, which takes the bundle's place when the context ends well.

    With keep False it never does: the copy is for trying something out, and not signed. Weights are
    hard links where the file system has them: only other files may be rewritten.
    """
    recover(directory)
    with staging_beside(directory) as staging:
        for path in sorted(directory.rglob("*")):
            if keep or path != directory / SIGNATURE:
                _bring(path, staging / path.relative_to(directory))
        yield staging
        if keep:
            publish(staging, directory, replace=True)


def write_config(directory: Path, text: str) -> None:
    """Replace the bundle's exit configuration, which no digest covers, in one step.

    A signature goes.
    """
    withdraw_signature(directory)
    staged = directory / f".{bundle.EXIT_CONFIG}"
    staged.write_text(text)
    staged.rename(directory / bundle.EXIT_CONFIG)


def _bring(path: Path, target: Path) -> None:
    if path.is_dir():
        target.mkdir()
        return
    if path.suffix == _WEIGHTS:
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    shutil.copy2(path, target)

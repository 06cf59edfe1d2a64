"""Change a bundle in place: all of a change appears, or nothing of it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sedac_export import manifest as bundle
from sedac_export.staging import claimed, replace_file

# the only files that a change never rewrites, and the only large ones
_WEIGHTS = ".data"


@contextlib.contextmanager
def edited_bundle(directory: Path, keep: bool = True) -> Iterator[Path]:
    """A copy of the bundle to change, which takes the bundle's place when the context ends well.

    With keep False it never does: the copy is for trying something out. Weights are hard links
    where the file system has them: only other files may be rewritten.
    """
    with claimed(directory) as claim, claim.staging() as staging:
        for path in sorted(claim.place.rglob("*")):
            # what was written under a hidden name and never got its own is no part of the bundle
            if not path.name.startswith("."):
                _bring(path, staging / path.relative_to(claim.place))
        yield staging
        if keep:
            claim.publish(staging, replace=True)


def write_config(directory: Path, text: str) -> None:
    """Replace the bundle's exit configuration, which no digest covers, in one step."""
    replace_file(directory / bundle.EXIT_CONFIG, text)


def _bring(path: Path, target: Path) -> None:
    if path.is_dir():
        target.mkdir()
        return
    if path.suffix == _WEIGHTS:
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    shutil.copy2(path, target)

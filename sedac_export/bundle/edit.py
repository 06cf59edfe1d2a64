"""Change a bundle in place: all of a change appears, or nothing of it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import EXIT_CONFIG, MANIFEST, MANIFEST_DIGEST
from sedac_export.bundle.signature import SIGNATURE, withdraw_signature
from sedac_export.bundle.staging import claimed, replace_file
from sedac_export.errors import SedacError
from sedac_runtime._core import read_unlisted

# what a change never rewrites, and all that is large: weights and what is built of them
_WEIGHTS, _BUILT = ".data", "engines/"


@contextlib.contextmanager
def edited_bundle(bundle: Bundle, keep: bool = True, output: Path | None = None) -> Iterator[Path]:
    """A copy of `bundle` to change, which takes its place when the context ends well.

    It holds what the manifest lists and the exit configuration, and nothing else that is in the
    directory. With keep False it never takes the place: the copy is for trying something out, and
    not signed. With an output it becomes a bundle of that name, and `bundle` stays as it is.
    Weights and what is built of them are hard links where the file system has them: only other
    files may be rewritten.

    Raises SedacError when `output` exists.
    """
    if output is not None and output.exists():
        raise SedacError(f"{output} exists; choose another --output")
    unlisted = (MANIFEST, MANIFEST_DIGEST, EXIT_CONFIG, *((SIGNATURE,) if keep else ()))
    with claimed(output or bundle.directory) as claim, claim.staging() as staging:
        for name in bundle.manifest.files:
            is_large = name.endswith(_WEIGHTS) or name.startswith(_BUILT)
            _bring(bundle.path(name), staging / name, linked=is_large)
        for name in unlisted:
            text = read_unlisted(bundle.directory, name)
            if text is not None:
                (staging / name).write_bytes(text)
        yield staging
        if keep:
            claim.publish(staging, replace=output is None)


def write_config(directory: Path, text: str) -> None:
    """Replace the bundle's exit configuration, which no digest covers, in one step.

    A signature goes.
    """
    withdraw_signature(directory)
    replace_file(directory / EXIT_CONFIG, text)


def _bring(path: Path, target: Path, linked: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if linked:
        with contextlib.suppress(OSError):
            os.link(path.resolve(), target)
            return
    shutil.copy2(path, target)

"""Whether --output can be written, said before the work and not after it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

from sedac_export.bundle.manifest import MANIFEST
from sedac_export.errors import SedacError


def check_file(output: Path) -> None:
    """Raise SedacError where no file can be written at `output`; pipes and devices pass."""
    with _writing(output, "file"):
        if output.is_file() or output.is_dir():
            output.open("ab").close()
        elif not output.exists():
            TemporaryFile(dir=output.parent).close()


def check_directory(output: Path) -> None:
    """Raise SedacError where `output` is no directory that can be written, nor can become one.

    What lies in a bundle and is none of its files goes when the bundle is edited.
    """
    if (output / MANIFEST).exists():
        raise SedacError(f"--output {output} is a bundle; give another directory")
    with _writing(output, "directory"):
        path = output.absolute()
        existing = next(each for each in (path, *path.parents) if each.exists())
        TemporaryFile(dir=existing).close()


@contextlib.contextmanager
def _writing(output: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SedacError(
            f"--output {output} cannot be written ({error.strerror}); give another {kind}"
        ) from error

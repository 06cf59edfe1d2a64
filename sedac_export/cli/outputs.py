"""Whether --output can be written, said before the work and not after it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

from sedac_export.bundle.manifest import MANIFEST
from sedac_export.errors import SedacError


def check_file(output: Path) -> None:
    """Raise SedacError where no file can be written at `output`; pipes and devices pass.

    Nor in a bundle, as for directories.
    """
    _refuse_bundles(output, "--output", "file")
    with _writing(output, "file"):
        if output.is_file() or output.is_dir():
            output.open("ab").close()
        elif not output.exists():
            TemporaryFile(dir=output.parent).close()


def check_directory(output: Path, option: str = "--output") -> None:
    """Raise SedacError where `output` is no directory that can be written, nor can become one.

    Nor in a bundle: what lies there and is none of its files goes when it is edited.
    """
    _refuse_bundles(output, option, "directory")
    with _writing(output, "directory", option):
        path = output.resolve()
        existing = next(place for place in (path, *path.parents) if place.exists())
        TemporaryFile(dir=existing).close()


def _refuse_bundles(output: Path, option: str, kind: str) -> None:
    path = output.resolve()
    bundle = next((place for place in (path, *path.parents) if (place / MANIFEST).exists()), None)
    if bundle is not None:
        raise SedacError(
            f"{option} {output} is in the bundle {bundle}, and would go when that is changed; give"
            f" another {kind}"
        )


@contextlib.contextmanager
def _writing(output: Path, kind: str, option: str = "--output") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SedacError(
            f"{option} {output} cannot be written ({error.strerror}); give another {kind}"
        ) from error

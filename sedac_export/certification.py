"""What the runtime says is certified of a bundle: it decides, for all who show it."""

from dataclasses import dataclass
from pathlib import Path

from sedac_export.errors import SedacError
from sedac_runtime import _core


@dataclass(frozen=True)
class Certification:
    """Whether the bundle's own exit configuration is certified, and a sentence about it."""

    certified: bool
    sentence: str


def read_certification(directory: Path) -> Certification:
    """What is certified of the bundle in `directory`. Its files are not checked.

    Raises SedacError when its manifest or its exit configuration cannot be used.
    """
    try:
        certificate, sentence = _core.certification(directory)
    except _core.SedacError as error:
        raise SedacError(str(error)) from error
    return Certification(certificate is not None, sentence)


def engines_sha256(directory: Path) -> str:
    """The digest by which certificates name what the bundle in `directory` runs.

    Raises SedacError when its manifest cannot be used.
    """
    try:
        return _core.engines_sha256(directory)
    except _core.SedacError as error:
        raise SedacError(str(error)) from error

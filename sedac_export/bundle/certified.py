"""What the runtime says is certified of a bundle: it decides, for all who show it."""

from dataclasses import dataclass

from sedac_export.bundle import Bundle


@dataclass(frozen=True)
class BundleCertification:
    """Whether the bundle's own exit configuration is certified, and a sentence about it."""

    certified: bool
    sentence: str


def read_certification(bundle: Bundle) -> BundleCertification:
    """What is certified of `bundle`.

    Raises SedacError when its exit configuration cannot be used.
    """
    certification = bundle.files.certification()
    return BundleCertification(certification.certificate is not None, str(certification))

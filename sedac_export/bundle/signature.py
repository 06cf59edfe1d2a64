"""A bundle's signature file, and what becomes of it when the bundle is changed."""

from pathlib import Path

from sedac_export.console import console

SIGNATURE = "model.sig"


def withdraw_signature(directory: Path) -> None:
    """Remove the signature of the bundle in `directory`, which is about to change, and say so."""
    path = directory / SIGNATURE
    if path.exists():
        path.unlink()
        console.print(
            f"{SIGNATURE} was removed, it signs what the bundle was before; sign again with"
            " sedac-export sign"
        )

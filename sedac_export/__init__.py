"""SEDAC's exporter: Hugging Face decoders to bundles of per-layer engines."""

from typing import TYPE_CHECKING, Any

from sedac_export.errors import SedacError

if TYPE_CHECKING:
    from sedac_export.accelerator import create_universal_accelerator
    from sedac_export.exporter import Built, Request, build

__all__ = ["Built", "Request", "SedacError", "build", "create_universal_accelerator"]


def __getattr__(name: str) -> Any:
    """Import the exporter, and torch with it, only when it is used."""
    if name in ("Built", "Request", "build"):
        from sedac_export import exporter

        return getattr(exporter, name)
    if name == "create_universal_accelerator":
        from sedac_export.accelerator import create_universal_accelerator

        return create_universal_accelerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

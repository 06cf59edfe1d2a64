"""SEDAC's exporter: Hugging Face decoders to bundles of per-layer engines."""

import importlib
from typing import TYPE_CHECKING, Any

from sedac_export.errors import SedacError

if TYPE_CHECKING:
    from sedac_export.build.exporter import BuildRequest, BuiltBundle, build_bundle
    from sedac_export.pytorch.accelerator import create_universal_accelerator

__all__ = [
    "BuildRequest",
    "BuiltBundle",
    "SedacError",
    "build_bundle",
    "create_universal_accelerator",
]

# imported when they are first used, and torch with them
_MODULES = {
    "BuildRequest": "sedac_export.build.exporter",
    "BuiltBundle": "sedac_export.build.exporter",
    "build_bundle": "sedac_export.build.exporter",
    "create_universal_accelerator": "sedac_export.pytorch.accelerator",
}


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from where it is defined."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)

"""SEDAC's exporter: Hugging Face decoders to bundles of per-layer engines."""

from sedac_export.errors import SedacError
from sedac_export.exporter import Built, Request, build

__all__ = ["Built", "Request", "SedacError", "build"]

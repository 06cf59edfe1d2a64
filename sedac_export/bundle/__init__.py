"""Bundles on disk: their manifest, exit configuration, changes and signatures. No torch."""

from sedac_export.bundle.bundle import Bundle

__all__ = ["Bundle"]

"""The command sedac-export."""

from sedac_export.cli.commands import app, main

__all__ = ["app", "main"]

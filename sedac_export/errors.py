"""Every error that users can cause; the command prints it as one line."""

from sedac_runtime._core import SedacError

__all__ = ["SedacError"]

"""Logging of the commands, off unless asked for.

The core's events arrive under the logger `sedac_core`, with Rust's module path below it: `.chain`
says why a draft was made or not, `.step` how long each step of the backend took and why it ended,
and at level trace `.backend.host_decided` the signals of every exit decision and `.engine` every
engine run. Levels are read when a logger is first used; set them before a bundle is loaded.
"""

import logging
from enum import StrEnum
from typing import Annotated

import typer

TRACE = 5


class LogLevel(StrEnum):
    """What --log-level takes."""

    TRACE = "trace"
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"


LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option("--log-level", help="Log events from this level on to stderr. [default: off]"),
]


def configure(log_level: LogLevelOption = None) -> None:
    """Log to stderr from `log_level` on; without one, nothing changes."""
    if log_level is None:
        return
    logging.addLevelName(TRACE, "TRACE")
    level = TRACE if log_level is LogLevel.TRACE else logging.getLevelName(log_level.upper())
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("sedac_core", "sedac_runtime", "sedac_export"):
        logging.getLogger(name).setLevel(level)

"""The commands' help shows what their options' texts say."""

import typer
from typer.testing import CliRunner

from sedac_export.cli import commands
from sedac_runtime import cli

FRAME = str.maketrans("", "", " \n│")


def test_help_shows_the_defaults_that_texts_name() -> None:
    """Rich would take [default: ...] for markup and drop it."""
    shown = 0
    for app in (cli.app, commands.app):
        group = typer.main.get_command(app)
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            output = CliRunner().invoke(app, [name, "--help"]).output.translate(FRAME)
            for parameter in command.params:
                _, bracket, default = (getattr(parameter, "help", None) or "").partition("[default")
                if bracket:
                    assert (bracket + default).translate(FRAME) in output, (name, parameter.name)
                    shown += 1
    assert shown >= 15

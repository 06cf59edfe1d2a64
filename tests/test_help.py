"""The commands' help shows what their options' texts say."""

import re

import pytest
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


GROUPED = [
    (
        cli.app,
        "generate",
        ["Input", "Mode and exits", "Sampling", "Output", "Engines and hardware"],
    ),
    (commands.app, "build", ["Weights", "Engines", "Targets"]),
]


@pytest.mark.parametrize(("app", "name", "groups"), GROUPED)
def test_long_lists_of_options_are_in_groups(
    app: typer.Typer, name: str, groups: list[str]
) -> None:
    output = CliRunner().invoke(app, [name, "--help"]).output
    assert re.findall(r"╭─ ([\w ]+) ─", output) == ["Options", *groups]
    group = typer.main.get_command(app)
    options = group.commands[name].params  # type: ignore[attr-defined]
    ungrouped = {option.name for option in options if option.rich_help_panel is None}
    assert ungrouped <= {"model", "output", "force"}

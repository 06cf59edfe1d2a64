"""What libraries say of a model that is fine is not the user's to read."""

from pathlib import Path

import pytest
from bad_input.command import call
from tiny_models import save_tiny_model

from sedac_export.cli import main


def test_a_build_logs_no_failure_of_a_library(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # a graph of this one has an operator whose shapes are not inferred
    save_tiny_model("gpt_neox", tmp_path / "model")
    arguments = ["build", "--model", tmp_path / "model", "--output", tmp_path / "bundle"]
    result = call(main, [str(argument) for argument in arguments], capfd)
    assert result.code == 0, result
    assert "Shape inference" not in caplog.text

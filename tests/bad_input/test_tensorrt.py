"""Bad input to the commands about TensorRT engines."""

import shutil
from pathlib import Path

import pytest
from tiny_models import save_tiny_model
from typer.testing import CliRunner

from sedac_export import SedacError
from sedac_export.bundle.manifest import read_manifest
from sedac_export.cli import app

RTX = ["--target", "tensorrt-rtx"]


def refusal(*arguments: str) -> str:
    run = CliRunner().invoke(app, list(arguments))
    assert isinstance(run.exception, SedacError)
    assert run.stdout == ""
    return str(run.exception)


@pytest.mark.parametrize("command", ["engines", "validate"])
def test_no_bundle(command: str, tmp_path: Path) -> None:
    assert "not a bundle" in refusal(command, str(tmp_path), *RTX)


def test_engines_of_a_damaged_bundle(demo_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    (copy / "onnx" / "layer_002.data").unlink()
    assert "layer_002.data is missing" in refusal("engines", str(copy), *RTX)


def test_onnxruntime_needs_no_engines(demo_bundle: Path) -> None:
    for command in ("engines", "validate"):
        assert "onnx" in refusal(command, str(demo_bundle), "--target", "onnxruntime").lower()


@pytest.mark.parametrize(
    "option",
    [["--max-batch-size", "0"], ["--max-prefill-chunk", "-1"], ["--compute-capabilities", "old"]],
)
def test_options_are_refused_before_the_model_is_read(option: list[str], tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    arguments = ["build", "--model", "no/model", "--output", str(output), *RTX, *option]
    assert option[0] in refusal(*arguments)
    assert not output.exists()


@pytest.mark.parametrize(
    "option",
    [["--max-batch-size", "4"], ["--compute-capabilities", "8.6"], ["--version-compatible"]],
)
def test_options_for_no_target_are_refused(
    option: list[str], demo_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    message = f"{option[0]} is for --target tensorrt and tensorrt-rtx; leave it out"
    assert message in refusal("build", "--model", "no/model", "--output", str(output), *option)
    assert message in refusal("engines", str(demo_bundle), "--target", "cuda", *option)


def test_another_model_is_refused_and_nothing_changed(demo_bundle: Path, tmp_path: Path) -> None:

    save_tiny_model("llama", tmp_path / "model")
    before = read_manifest(demo_bundle)
    message = refusal("engines", str(demo_bundle), *RTX, "--model", str(tmp_path / "model"))
    assert "its number of layers is 4, the bundle's 12" in message
    assert read_manifest(demo_bundle) == before
    assert not list((demo_bundle / "onnx").glob("portable_*"))

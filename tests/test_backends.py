"""What --backend chooses, and what it says where that cannot run."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO_MODEL, THREADS
from rehearsal import add_stand_ins

from sedac_runtime import BundleError, InputError, SedacModel


def test_cuda_needs_its_engines(demo_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"add them with sedac-export engines .* --target cuda"):
        SedacModel.from_pretrained(demo_bundle, threads=THREADS, backend="cuda")


def test_auto_falls_back_and_says_why(
    demo_bundle: Path, demo_model: SedacModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sedac_runtime"):
        model = SedacModel.from_pretrained(demo_bundle, threads=THREADS, backend="auto")
    assert (model.backend, model.device) == ("onnxruntime", "cpu")
    names = [name for name, _ in model.passed_over]
    reasons = [reason for _, reason in model.passed_over]
    assert names == ["cuda", "onnxruntime on cuda"]
    assert "holds no cuda engines" in reasons[0] and "--target onnxruntime-cuda" in reasons[1]
    chosen, *passed_over = [record.getMessage() for record in caplog.records]
    assert chosen == "backend auto: onnxruntime on cpu"
    assert passed_over == [f"backend auto: not {name}: {why}" for name, why in model.passed_over]
    text = "class Stack:"
    ours, theirs = (each.generate(text, max_new_tokens=20) for each in (model, demo_model))
    assert ours.tokens == theirs.tokens
    assert (demo_model.backend, demo_model.passed_over) == ("onnxruntime", [])


def test_backends_are_known(demo_bundle: Path) -> None:
    with pytest.raises(InputError, match="backend metal is out of range: auto or onnxruntime or"):
        SedacModel.from_pretrained(demo_bundle, backend="metal")  # type: ignore[arg-type]


def generate(bundle: Path, backend: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sedac_runtime.cli", "generate", "--engines", str(bundle)]
    command += ["--prompt", "class Stack:", "--max-new-tokens", "4", "--backend", backend, *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_says_both_on_stderr(demo_bundle: Path) -> None:
    refused = generate(demo_bundle, "cuda")
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and "holds no cuda engines" in line
    chosen = generate(demo_bundle, "auto")
    assert chosen.returncode == 0
    assert chosen.stderr.startswith("backend auto: onnxruntime on cpu\nbackend auto: not cuda: ")


def test_auto_takes_plans_before_onnxruntime(demo_bundle: Path, tmp_path: Path) -> None:
    """Their package is not installed, or there is no GPU: that is said, and the next one tried."""
    directory = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    add_stand_ins(directory, DEMO_MODEL, "tensorrt", max_prefill_chunk=32)
    model = SedacModel.from_pretrained(directory, threads=THREADS, backend="auto")
    reasons = dict(model.passed_over)
    assert list(reasons) == ["cuda", "tensorrt", "onnxruntime on cuda"]
    assert reasons["tensorrt"].startswith("backend tensorrt needs")


def test_a_device_that_is_not_there_is_said_before_anything_is_generated(
    demo_bundle: Path,
) -> None:
    refused = generate(demo_bundle, "onnxruntime", "--device", "cuda")
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and ("--device cpu" in line or "--target onnxruntime" in line)

"""What --backend chooses, and what it says where that cannot run."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import THREADS

from sedac_runtime import BundleError, InputError, SedacModel


def test_cuda_needs_its_engines(demo_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"add them with sedac-export engines .* --target cuda"):
        SedacModel.from_pretrained(demo_bundle, threads=THREADS, backend="cuda")


def test_auto_falls_back_and_says_why(
    demo_bundle: Path, demo_model: SedacModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sedac_runtime"):
        model = SedacModel.from_pretrained(demo_bundle, threads=THREADS, backend="auto")
    assert model.backend == "onnxruntime"
    assert model.fallback is not None and "holds no cuda engines" in model.fallback
    (record,) = caplog.records
    assert record.getMessage() == f"backend auto: onnxruntime, not cuda: {model.fallback}"
    text = "class Stack:"
    ours, theirs = (each.generate(text, max_new_tokens=20) for each in (model, demo_model))
    assert ours.tokens == theirs.tokens
    assert (demo_model.backend, demo_model.fallback) == ("onnxruntime", None)


def test_backends_are_known(demo_bundle: Path) -> None:
    with pytest.raises(InputError, match="backend metal is out of range: auto or onnxruntime or"):
        SedacModel.from_pretrained(demo_bundle, backend="metal")  # type: ignore[arg-type]


def generate(bundle: Path, backend: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sedac_runtime.cli", "generate", "--engines", str(bundle)]
    command += ["--prompt", "class Stack:", "--max-new-tokens", "4", "--backend", backend]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_says_both_on_stderr(demo_bundle: Path) -> None:
    refused = generate(demo_bundle, "cuda")
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and "holds no cuda engines" in line
    chosen = generate(demo_bundle, "auto")
    assert chosen.returncode == 0
    assert chosen.stderr.startswith("backend auto: onnxruntime, not cuda: ")

"""The programs in examples/, as a reader runs them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from certificates import certificate_of, write_certified
from conftest import DEMO_MODEL

from sedac_runtime import SedacModel

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "class Stack:\n    def push(self, item):\n"


def run(name: str, *arguments: object) -> list[str]:
    """The lines that an example prints, in a process whose ONNX Runtime is its own."""
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_there_are_eight_and_all_are_run() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert len(names) == 8
    # those of the server are run where there is one
    tests = (Path(__file__), Path(__file__).parent / "serve" / "test_server_examples.py")
    text = "".join(path.read_text() for path in tests)
    assert all(f'"{name}"' in text for name in names)


def test_generate_text(demo_bundle: Path, demo_model: SedacModel) -> None:
    full = demo_model.generate(PROMPT, mode="full", max_new_tokens=64)
    assert run("generate_text.py", demo_bundle, PROMPT) == (PROMPT + full.text).splitlines()


def test_stream_exits(demo_bundle: Path) -> None:
    *tokens, mean = run("stream_exits.py", demo_bundle, PROMPT)
    depths = [int(line.split()[0]) for line in tokens]
    assert len(set(depths)) > 1
    assert mean == f"mean exit layer {sum(depths) / len(depths):.1f} of 12"


def test_compare_modes(demo_bundle: Path) -> None:
    _, full, lossless, exits = run("compare_modes.py", demo_bundle, PROMPT)
    assert full.endswith("12.0  full depth's")
    assert lossless.endswith("full depth's")
    assert float(exits.split()[2]) < 12


# tests/export/pytorch has its steps
@pytest.mark.slow
def test_exit_in_pytorch() -> None:
    lines = run("exit_in_pytorch.py", DEMO_MODEL, PROMPT)
    means = [float(line.split("layer ")[1].split(",")[0]) for line in lines]
    assert means == sorted(means, reverse=True)
    assert means[-1] < means[0] <= 12


def test_read_certificate(demo_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    write_certified(bundle, certificate_of(bundle))
    certified, bound, sampled = run("read_certificate.py", bundle, PROMPT)
    assert certified.startswith("exits certified for given text and argmax")
    assert bound == "risk at most 0.98% with confidence 95%"
    assert sampled.startswith("exits not certified (tokens are sampled")


def test_batch_texts(demo_bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def push(self, item):\nimport os\n")
    lines = [json.loads(line) for line in run("batch_texts.py", demo_bundle, prompts)]
    assert [line["prompt"] for line in lines] == prompts.read_text().splitlines()
    assert all(line["text"] for line in lines)

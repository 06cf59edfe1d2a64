"""The programs in examples/, as a reader runs them."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from certificates import certificate_of, write_certified
from conftest import DEMO_MODEL
from transformers import AutoModelForCausalLM

from sedac_runtime import SedacModel

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "class Stack:\n    def push(self, item):\n"


def run(name: str, *arguments: object) -> list[str]:
    """The lines that an example prints, in a process whose ONNX Runtime is its own."""
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_there_are_nine_and_all_are_run() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert len(names) == 9
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


def test_train_for_exits(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(json.__file__).read_text() + Path(argparse.__file__).read_text())
    output = tmp_path / "model"
    size = ("--steps", 12, "--batch-size", 4, "--length", 64, "--exit-every", 4)
    lines = run("train_for_exits.py", DEMO_MODEL, output, "--data", text, *size)
    losses = {
        line.split(":")[0]: [float(part.split()[-1]) for part in line.split(",")]
        for line in lines
        if line.startswith("layer")
    }
    assert list(losses) == ["layer 4", "layer 8", "layer 12"]
    assert all(after < before for before, after in losses.values()), losses
    trained = AutoModelForCausalLM.from_pretrained(output)
    original = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    assert trained.config.num_hidden_layers == original.config.num_hidden_layers
    changed = [
        not torch.equal(ours.float(), theirs.float())
        for ours, theirs in zip(trained.parameters(), original.parameters(), strict=True)
    ]
    assert all(changed)


@pytest.mark.parametrize(
    ("output", "settings", "reason"),
    [
        ("text.py", (), "File exists"),
        ("model", ("--length", 100_000), "fewer than two sequences"),
        ("model", ("--exit-every", 12), "leaves no exit before the last of 12 layers"),
        ("model", ("--steps", 0), "--steps"),
    ],
)
def test_train_for_exits_says_before_training_what_cannot_be(
    tmp_path: Path, output: str, settings: tuple[object, ...], reason: str
) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(argparse.__file__).read_text())
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run("train_for_exits.py", DEMO_MODEL, tmp_path / output, "--data", text, *settings)
    assert caught.value.returncode == 2
    assert reason in caught.value.stderr.splitlines()[-1]

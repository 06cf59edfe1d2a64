"""A terminal gets no control characters of models and bundles; everything else gets all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sedac_export.cli
import sedac_runtime.cli
from bad_input.command import call, rewrite_file, rewrite_manifest
from sedac_runtime.terminal import visible

CONTROLS = "\x1b[31m\u202e\r"


def test_controls_are_written_out() -> None:
    assert visible("a\x00\x1b\r\x7f\x9b\u2067z") == r"a\x00\x1b\r\x7f\x9b\u2067z"
    text = "tab\tline\né 漢 👩\u200d🔬 \u0645\u06cc\u200c\u062e"
    assert visible(text) == text


@pytest.fixture
def colourful_bundle(bundle: Path) -> Path:
    """A bundle whose every e comes out as control characters."""
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "e"}, "content": CONTROLS}
    decoders = [tokenizer["decoder"], replace]
    tokenizer["decoder"] = {"type": "Sequence", "decoders": decoders}
    rewrite_file(bundle, "tokenizer.json", json.dumps(tokenizer).encode())
    return bundle


def run_on_terminal(arguments: list[str]) -> str:
    """What the command shows on a terminal."""
    ours, theirs = os.openpty()
    code = "from sedac_runtime.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=theirs) as process:
        os.close(theirs)
        shown = b""
        while part := read(ours):
            shown += part
    os.close(ours)
    assert process.returncode == 0
    return shown.decode()


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # nobody holds its other end any more
        return b""


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_generated_text_is_escaped_on_a_terminal_only(
    colourful_bundle: Path, capfd: pytest.CaptureFixture[str], stream: str
) -> None:
    # of a random model with this seed; some e is among the tokens
    sampled = ["--temperature", "1", "--seed", "1", "--max-new-tokens", "40", stream]
    arguments = ["generate", "--engines", str(colourful_bundle), "--prompt", "def", *sampled]
    piped = call(sedac_runtime.cli.main, arguments, capfd).out
    assert CONTROLS in piped
    shown = run_on_terminal(arguments).replace("\r\n", "\n")
    assert shown == visible(piped)


def test_names_of_a_bundle_are_escaped(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = json.loads((bundle / "bundle.json").read_text())["model"]
    name = f"[red]{CONTROLS}\nfake"
    rewrite_manifest(bundle, model=model | {"name": name})
    result = call(sedac_export.cli.main, ["inspect", str(bundle)], capfd)
    assert result.out.startswith(r"[red]\x1b[31m\u202e\r\nfake: llama")
    as_json = call(sedac_export.cli.main, ["inspect", str(bundle), "--json"], capfd)
    assert json.loads(as_json.out)["model"]["name"] == name


def test_errors_are_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"no{CONTROLS}"
    for main, command in (
        (sedac_runtime.cli.main, ["generate", "--prompt", "p", "--engines", str(path)]),
        (sedac_export.cli.main, ["inspect", str(path)]),
    ):
        result = call(main, command, capfd)
        assert result.code == 2
        assert r"no\x1b[31m\u202e" in result.err
        assert "\x1b" not in result.err

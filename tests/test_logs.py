"""What --log-level and --profile show, and that nothing is logged unless asked for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sedac_runtime import SedacModel

COMMAND = (sys.executable, "-m", "sedac_runtime.cli")
GENERATE = ("--prompt", "def main():\n    ", "--max-new-tokens", "6")


def generate(bundle: Path, *arguments: str, before: tuple[str, ...] = ()) -> str:
    """What the command prints on stderr, in a process whose loggers are fresh."""
    command = [*COMMAND, *before, "generate", "--engines", str(bundle), *GENERATE, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


@pytest.mark.parametrize(
    ("level", "shown", "hidden"),
    [
        ("info", ["sedac_core.chain: generated prompt_tokens="], ["sedac_core.step"]),
        (
            "debug",
            # drafted or not, as costs on this machine decide: either is explained
            ["sedac_core.step: tokens=1 depth=", "draft", "speedup="],
            ["sedac_core.engine"],
        ),
        ("trace", ["sedac_core.engine: engine=layer 0 tokens=1"], []),
    ],
)
def test_a_level_shows_its_events(
    demo_bundle: Path, level: str, shown: list[str], hidden: list[str]
) -> None:
    log = generate(demo_bundle, "--mode", "lossless", before=("--log-level", level))
    assert all(words in log for words in shown), log
    assert not any(words in log for words in hidden), log


def test_exit_decisions_are_explained_and_off_by_default(demo_bundle: Path) -> None:
    log = generate(demo_bundle, "--mode", "exit", before=("--log-level", "trace"))
    decisions = [line for line in log.splitlines() if "exit rule depth=" in line]
    assert any("decision=None" in line for line in decisions), log
    assert any("reason: Stability" in line for line in decisions), log
    assert "sedac_core" not in generate(demo_bundle, "--mode", "exit")


def test_a_profile_is_a_chrome_trace_of_steps_and_engines(
    demo_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    generate(demo_bundle, "--mode", "full", "--profile", str(file))
    events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)
    steps = [event["name"] for event in events if event["tid"] == 1]
    assert steps == ["prefill", *["decode"] * 5]
    engines = [event["name"] for event in events if event["tid"] == 2]
    assert [engines.count(name) for name in ("embed", "layer 0", "layer 11", "head")] == [6] * 4


@pytest.mark.parametrize("kv_fill", ["propagate", "defer"])
def test_only_tokens_are_embedded(demo_model: SedacModel, kv_fill: Any) -> None:
    """Positions that are filled later need contexts alone, resumed ones not even these."""
    limits: dict[str, Any] = {"max_new_tokens": 6, "stop_tokens": []}
    generation = demo_model.stream(
        "def main():", forced_exit=[3, 12], kv_fill=kv_fill, profile=True, **limits
    )
    assert len(list(generation)) == 6
    events = json.loads(generation.profile or "")["traceEvents"]
    engines = [event["name"] for event in events]
    assert engines.count("embed") == 6
    # attention has the tables in its engines
    assert ("contexts" in engines) == (kv_fill == "propagate")


def test_a_profile_needs_a_directory(demo_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        generate(demo_bundle, "--profile", str(tmp_path / "none" / "profile.json"))
    assert failed.value.returncode == 2
    assert "create" in failed.value.stderr
    with pytest.raises(subprocess.CalledProcessError) as no_file:
        generate(demo_bundle, "--profile", str(tmp_path))
    assert (no_file.value.returncode, no_file.value.stdout) == (2, "")
    assert "is a directory" in no_file.value.stderr

"""A build that is stopped, or meets another one, leaves no bundle and no remains."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from build_cache import BuildCache

import sedac_export.cli
from bad_input.command import Command, Result, assert_one_line_error
from sedac_export.build import exporter


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Starts processes that need not import torch again: that takes seconds.

    Quick runs go without: tests/export/bundle kills what writes bundles.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sedac_export.build.exporter"])
    return context


@dataclass(frozen=True)
class SeparateBuild:
    """`sedac-export build` in a separate process, which waits with its engines written.

    It goes on when `release` is called; stdout and stderr are in `log`.
    """

    process: ForkServerProcess
    output: Path
    log: Path
    gate: Path

    def wait_for_engines(self) -> None:
        """Wait until all engines are written beside the output, and not yet validated."""
        while not self.gate.with_suffix(".reached").exists():
            assert self.process.is_alive()
            time.sleep(0.002)
        assert list(self.output.parent.glob(f".{self.output.name}.*/onnx/*"))

    def release(self) -> None:
        """Let the build finish."""
        self.gate.touch()


StartBuild = Callable[[Path, Path], SeparateBuild]


@pytest.fixture
def start_build(
    processes: ForkServerContext, build_cache: BuildCache, tmp_path: Path
) -> StartBuild:
    def start(model: Path, output: Path) -> SeparateBuild:
        arguments = ["build", "--model", str(model), "--output", str(output)]
        log, gate = tmp_path / "log", tmp_path / "gate"
        process = processes.Process(
            target=run_in_process, args=(arguments, log, build_cache, gate), daemon=True
        )
        process.start()
        return SeparateBuild(process, output, log, gate)

    return start


def run_in_process(arguments: list[str], log: Path, build_cache: BuildCache, gate: Path) -> None:
    validate = exporter.validate

    def validate_behind_gate(*given: Any) -> Any:
        gate.with_suffix(".reached").touch()
        while not gate.exists():
            time.sleep(0.002)
        return validate(*given)

    patch = pytest.MonkeyPatch()
    patch.setattr(exporter, "trace_graphs", build_cache.tracing(exporter.trace_graphs))
    patch.setattr(exporter, "validate", validate_behind_gate)
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # a shell's background jobs, CI's among them, start with Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["sedac-export", *arguments]
    sedac_export.cli.main()


@pytest.mark.slow
def test_killed_build_leaves_no_bundle_and_the_next_one_cleans_up(
    export: Command, start_build: StartBuild, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output" / "bundle"
    build = start_build(model, output)
    build.wait_for_engines()
    build.process.kill()
    build.process.join()
    assert build.process.exitcode == -signal.SIGKILL
    abandoned = sorted(path.name for path in output.parent.iterdir())
    assert abandoned == [".bundle.building", ".bundle.lock"]
    assert_one_line_error(export("build", "--model", "nowhere", "--output", output), "nowhere")
    assert not list(output.parent.iterdir())


def test_interrupt_within_a_build_leaves_nothing(
    export: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "validate", interrupted)
    output = tmp_path / "output" / "bundle"
    result = export("build", "--model", model, "--output", output)
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1].strip() == "stopped"
    assert "Traceback" not in result.err
    assert not output.parent.exists()


@pytest.mark.slow
def test_interrupted_build_leaves_nothing(
    start_build: StartBuild, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output" / "bundle"
    build = start_build(model, output)
    build.wait_for_engines()
    os.kill(build.process.pid or 0, signal.SIGINT)
    build.process.join(20)
    assert build.process.exitcode == 130
    log = build.log.read_text()
    assert "Traceback" not in log and log.splitlines()[-1] == "stopped"
    assert not output.parent.exists()


@pytest.mark.slow
def test_libraries_do_not_add_lines(start_build: StartBuild, model: Path, tmp_path: Path) -> None:
    config = model / "config.json"
    odd = {"rope_parameters": {"rope_type": "odd"}}  # transformers would also warn of it
    config.write_text(json.dumps(json.loads(config.read_text()) | odd))
    build = start_build(model, tmp_path / "bundle")
    build.process.join(60)
    result = Result(build.process.exitcode or 0, "", build.log.read_text())
    assert_one_line_error(result, "config.json", "odd")


@pytest.mark.slow
def test_two_builds_of_one_bundle_do_not_meet(
    export: Command, start_build: StartBuild, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output" / "bundle"
    build = start_build(model, output)
    build.wait_for_engines()
    result = export("build", "--model", model, "--output", output)
    assert_one_line_error(result, str(output), "another process", "wait")
    build.release()
    build.process.join(120)
    assert build.process.exitcode == 0
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]

"""What ci/validate_engines.sh makes of its runs; the runs themselves are left to .ci/run."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sedac_runtime.flavour import Gpu

CI = Path(__file__).parents[2] / "ci"
RTX = "tensorrt-rtx"


@pytest.fixture
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", CI / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(passed: bool | None) -> dict[str, Any]:
    if passed is None:
        return {
            "checked": False,
            "passed": None,
            "reason": "no supported GPU: none",
            "problems": [],
        }
    return {"checked": True, "passed": passed, "problems": [] if passed else ["layer_003: far"]}


def run(
    output: Path,
    number: int,
    execution: bool | None,
    agreement: bool = True,
    over_plans: list[int] | None = None,
) -> None:
    directory = output / f"run-{number}"
    directory.mkdir()
    (directory / "model").write_text("demo\n")
    (directory / "target").write_text(f"{RTX}\n")
    (directory / "generate.json").write_text(json.dumps({"tokens": [1, 2]}))
    if execution is not None:
        (directory / "plans.json").write_text(json.dumps({"tokens": over_plans or [1, 2]}))
    checks = {
        "structure": check(True) | {"engines": [{}, {}, {}]},
        "onnxruntime": check(agreement),
        "execution": check(execution),
    }
    facts = {
        "version": "1.7.1",
        "build_seconds": {"embed": 0.1, "layer_000": 0.4, "layer_001": 0.6},
        "checks": checks,
        "passed": agreement and execution is not False,
    }
    (directory / "validate.json").write_text(json.dumps({"targets": {RTX: facts}}))


def test_engines_that_were_executed_need_no_allowance(report: ModuleType, tmp_path: Path) -> None:
    run(tmp_path, 1, execution=True)
    assert report.write(tmp_path, allow_no_gpu=False) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["executed"]
    assert written["runs"][0]["seconds_per_layer_engine"] == 0.5


def test_a_chain_over_plans_that_says_something_else_fails(
    report: ModuleType, tmp_path: Path
) -> None:
    run(tmp_path, 1, execution=True, over_plans=[7, 8])
    assert report.write(tmp_path, allow_no_gpu=False) == 1
    assert "chain: 0% of the tokens are those" in (tmp_path / "report.md").read_text()
    (tmp_path / "run-1" / "plans.json").write_text("")
    (tmp_path / "run-1" / "plans.log").write_text("error: layer_000.plan: no such stream\n")
    assert report.write(tmp_path, allow_no_gpu=False) == 1
    assert "layer_000.plan: no such stream" in (tmp_path / "report.md").read_text()


def test_without_a_gpu_the_exit_code_is_0_only_when_allowed(
    report: ModuleType, tmp_path: Path
) -> None:
    run(tmp_path, 1, execution=None)
    assert report.write(tmp_path, allow_no_gpu=False) == 3
    assert report.write(tmp_path, allow_no_gpu=True) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| demo | TensorRT-RTX 1.7.1 | 3 | 0.5 | passed | passed | not run | not run |" in text
    assert "demo, TensorRT-RTX, execution: no supported GPU: none" in text
    assert "tests on the GPU not run: this host has no NVIDIA GPU" in text


@pytest.mark.parametrize(("execution", "agreement"), [(False, True), (None, False)])
def test_what_failed_is_no_matter_of_allowance(
    report: ModuleType, tmp_path: Path, execution: bool | None, agreement: bool
) -> None:
    run(tmp_path, 1, execution, agreement)
    assert report.write(tmp_path, allow_no_gpu=True) == 1
    assert "FAILED" in (tmp_path / "report.md").read_text()


def test_a_build_that_failed_is_a_failure_and_nothing_built_is_none(
    report: ModuleType, tmp_path: Path
) -> None:
    directory = tmp_path / "run-1"
    directory.mkdir()
    (directory / "model").write_text("demo\n")
    (directory / "target").write_text(f"{RTX}\n")
    (directory / "build.log").write_text("error: operator Odd is not supported\n")
    assert report.write(tmp_path, allow_no_gpu=True) == 1
    assert (
        "demo, TensorRT-RTX: operator Odd is not supported" in (tmp_path / "report.md").read_text()
    )


@pytest.mark.parametrize(("code", "word"), [(0, "passed"), (1, "FAILED: 1 failed in 2 s")])
def test_tests_on_the_gpu_are_part_of_the_report(
    report: ModuleType, tmp_path: Path, code: int, word: str
) -> None:
    run(tmp_path, 1, execution=True)
    (tmp_path / "gpu_tests.code").write_text(f"{code}\n")
    (tmp_path / "gpu_tests.log").write_text("collected\n1 failed in 2 s\n")
    assert report.write(tmp_path, allow_no_gpu=False) == code
    assert f"- tests on the GPU {word}\n" in (tmp_path / "report.md").read_text()


def test_the_chain_is_reported_beside_the_plans(report: ModuleType, tmp_path: Path) -> None:
    run(tmp_path, 1, execution=True)
    directory = tmp_path / "run-1"
    (directory / "target").write_text("cuda\n")
    facts = json.loads((directory / "validate.json").read_text())["targets"][RTX]
    del facts["build_seconds"]
    facts["version"] = "13.2"
    (directory / "validate.json").write_text(json.dumps({"targets": {"cuda": facts}}))
    assert report.write(tmp_path, allow_no_gpu=False) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| demo | CUDA chain 13.2 | 3 |  | passed | passed | passed | passed |" in text


def test_graphs_for_onnxruntime_on_gpus_are_checked_on_any_host(
    report: ModuleType, tmp_path: Path
) -> None:
    assert report.installed("onnxruntime-cuda") == 0
    run(tmp_path, 1, execution=None)
    directory = tmp_path / "run-1"
    facts = json.loads((directory / "validate.json").read_text())["targets"][RTX]
    facts["version"] = "1.32.0"
    del facts["build_seconds"]
    (directory / "target").write_text("onnxruntime-cuda\n")
    (directory / "validate.json").write_text(json.dumps({"targets": {"onnxruntime-cuda": facts}}))
    assert report.write(tmp_path, allow_no_gpu=True) == 0
    text = (tmp_path / "report.md").read_text()
    title = "ONNX Runtime's CUDA provider"
    assert f"| demo | {title} 1.32.0 | 3 |  | passed | passed | not run | not run |" in text


def test_a_model_that_the_kernel_does_not_compute_is_no_failure(
    report: ModuleType, tmp_path: Path
) -> None:
    run(tmp_path, 1, execution=True)
    directory = tmp_path / "run-2"
    (directory / "bundle").mkdir(parents=True)
    (directory / "model").write_text("gpt2\n")
    (directory / "target").write_text("cuda\n")
    (directory / "build.log").write_text("error: the cuda target cannot run this model\n")
    manifest = directory / "bundle" / "bundle.json"
    manifest.write_text(json.dumps({"cuda_refusal": "its norms are odd"}))
    assert report.write(tmp_path, allow_no_gpu=False) == 0
    assert "| gpt2 | CUDA chain | not built |" in (tmp_path / "report.md").read_text()
    manifest.unlink()
    assert report.write(tmp_path, allow_no_gpu=False) == 1


def test_a_host_with_a_gpu_names_it(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_gpu", lambda: Gpu("RTX 4090", "8.9", "580.1"))
    run(tmp_path, 1, execution=True)
    report.write(tmp_path, allow_no_gpu=False)
    assert "RTX 4090, driver 580.1" in (tmp_path / "report.md").read_text()


def test_the_script_refuses_what_it_does_not_know() -> None:
    script = str(CI / "validate_engines.sh")
    for arguments in (["--nonsense"], ["--precision", "fp8"], ["--output"]):
        done = subprocess.run([script, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1

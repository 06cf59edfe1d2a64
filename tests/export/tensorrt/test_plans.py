"""Plans built for real by TensorRT-RTX, which needs no GPU for that."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ARCHITECTURES

from sedac_export import SedacError
from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import read_manifest
from sedac_export.bundle.plan_entries import BuildOptions
from sedac_export.tensorrt.add import add_target
from sedac_export.tensorrt.build_plans import check_options
from sedac_export.tensorrt.installed import check_compatible
from sedac_export.tensorrt.profiles import graph_profiles
from sedac_export.tensorrt.worker import Worker
from sedac_runtime.flavour import Gpu

from .conftest import OPTIONS, RTX, PortableTiny


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    """The plans that workers build from now on; building number `stop_at` is interrupted."""
    built: list[str] = []
    call = Worker.call

    def counting(self: Worker, function: str, **arguments: Any) -> Any:
        if function == "build":
            if len(built) == stop_at:
                raise KeyboardInterrupt
            built.append(Path(arguments["plan"]).stem)
        return call(self, function, **arguments)

    monkeypatch.setattr(Worker, "call", counting)
    return built


def test_all_engines_are_built(planned: Path) -> None:
    manifest = Bundle.open(planned).manifest
    plans = manifest.plans[RTX]
    layers = range(manifest.model.num_layers)
    names = [
        "embed",
        "contexts",
        *(f"layer_{i:03}" for i in layers),
        *(f"kv_{i:03}" for i in layers),
        "head",
    ]
    assert [Path(plan.file).stem for plan in plans.plans] == names
    assert {plan.file for plan in plans.plans} <= manifest.files.keys()
    assert plans.compute_capabilities == ["8.0", "8.6", "8.9", "12.0", "12.1"]
    assert plans.platform.startswith("linux-")
    for plan in plans.plans:
        cached = Path(plan.file).stem.startswith(("layer_", "kv_"))
        caches = {"present_key_0": "past_key_0", "present_value_0": "past_value_0"}
        assert plan.aliases == (caches if cached else {})
    left = {path.name for path in (planned / "engines" / RTX).iterdir()}
    assert left - {f"{name}.plan" for name in names} <= {"timing.cache", "timing.cache.lock"}


@pytest.mark.rotating
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_builds_in_fp16(name: str, portable_tiny: PortableTiny) -> None:
    options = BuildOptions(max_batch_size=2, max_prefill_chunk=32)
    plans = add_target(portable_tiny(name, "fp16")[0], RTX, options)
    # embed, head and two of each layer; positions that rotate nothing have no contexts
    assert len(plans.plans) == (10 if name in ("gpt2", "opt") else 11)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_other_precisions_build(precision: str, portable_tiny: PortableTiny) -> None:
    directory, _ = portable_tiny("llama", precision)
    assert len(add_target(directory, RTX, BuildOptions()).plans) == 11


@pytest.mark.slow
def test_a_stopped_build_goes_on(own_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other options: all plans are new. Interrupted after three, the rest are built later."""
    options = BuildOptions(max_prefill_chunk=64, compute_capabilities=["8.6"])
    with monkeypatch.context() as patch:
        first = counted(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            add_target(own_tiny, RTX, options)
    stopped = Bundle.open(own_tiny).manifest
    assert stopped.plans == {}
    rest = counted(monkeypatch)
    plans = add_target(own_tiny, RTX, options)
    assert first == ["embed", "contexts", "layer_000"]
    assert len(rest) == 8
    assert not set(first) & set(rest)
    assert plans.compute_capabilities == ["8.6"]
    Bundle.open(own_tiny)


def test_finished_plans_are_kept_and_damaged_ones_built_again(
    own_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = counted(monkeypatch)
    add_target(own_tiny, RTX, OPTIONS)
    assert built == []
    (own_tiny / "engines" / RTX / "layer_001.plan").write_bytes(b"cut off")
    (own_tiny / "engines" / RTX / "head.plan").unlink()
    add_target(own_tiny, RTX, OPTIONS)
    assert built == ["layer_001", "head"]


def test_profiles_are_decode_verify_and_prefill(planned_tiny: Path) -> None:
    graph = planned_tiny / "onnx" / "portable_layer_000.onnx"
    options = BuildOptions(max_batch_size=4, max_prefill_chunk=300)
    shapes = [profile["x"] for profile in graph_profiles(graph, options, 2048, head=False)]
    size = shapes[0][0][2]
    assert shapes == [
        [[1, 1, size], [1, 1, size], [4, 1, size]],
        [[1, 1, size], [1, 16, size], [4, 16, size]],
        [[1, 1, size], [1, 300, size], [4, 300, size]],
    ]
    decode = graph_profiles(graph, options, 2048, head=False)[0]
    assert decode["write_index"] == [[1], [1], [4]]
    assert decode["mask"][2][:3] == [4, 1, 1]
    assert len(graph_profiles(graph, options, 2048, head=True)) == 2


def test_a_bundle_without_portable_graphs_asks_for_the_model(demo_bundle: Path) -> None:
    with pytest.raises(SedacError, match="holds no graphs that TensorRT takes; name the model"):
        add_target(demo_bundle, RTX, OPTIONS)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (RTX, {"max_batch_size": 0}, "--max-batch-size 0 is out of range"),
        (RTX, {"max_prefill_chunk": 0}, "--max-prefill-chunk 0 is out of range"),
        (RTX, {"compute_capabilities": ["9.0"]}, "--compute-capabilities 9.0 is none of 8.0"),
        (RTX, {"version_compatible": True}, "--version-compatible is not for TensorRT-RTX"),
        (RTX, {"hardware_compatible": True}, "--hardware-compatible is not for TensorRT-RTX"),
    ],
)
def test_options_out_of_range_are_refused(
    target: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SedacError, match=message):
        check_options(target, BuildOptions(**options))


@pytest.mark.parametrize("target", ["tensorrt", RTX])
def test_a_missing_flavour_is_named_with_its_install_line(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = rf"which is not installed; pip install 'sedac\[{target}\]'"
    with pytest.raises(SedacError, match=line):
        check_options(target, BuildOptions())


def test_what_cannot_load_a_plan_is_named_on_both_sides(planned_tiny: Path) -> None:
    plans = read_manifest(planned_tiny).plans[RTX]
    fitting = Gpu("RTX 4090", "8.9", "580.1")
    check_compatible(RTX, plans, plans.version, fitting)
    with pytest.raises(SedacError, match=rf"of TensorRT-RTX {plans.version} and 9.9 is installed"):
        check_compatible(RTX, plans, "9.9", fitting)
    both = "capability 8.0, 8.6, 8.9, 12.0, 12.1 and H200 has 9.0"
    with pytest.raises(SedacError, match=both):
        check_compatible(RTX, plans, plans.version, Gpu("H200", "9.0", "580.1"))
    elsewhere = plans.model_copy(update={"platform": "windows-amd64"})
    with pytest.raises(SedacError, match="plans are for windows-amd64 and this host is linux-"):
        check_compatible(RTX, elsewhere, plans.version, fitting)


def test_an_operator_that_tensorrt_refuses_is_named(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="com.microsoft")
    domains = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "odd", [value], [result])
    onnx.save(helper.make_model(graph, opset_imports=domains), tmp_path / "odd.onnx")
    with (
        Worker(RTX) as worker,
        pytest.raises(SedacError, match=r"TensorRT-RTX: odd\.onnx: .*NoSuchOperator"),
    ):
        worker.call("describe", graph=str(tmp_path / "odd.onnx"))


def test_a_worker_that_dies_is_an_error_of_one_line() -> None:
    with Worker(RTX) as worker:
        worker.process.kill()
        with pytest.raises(SedacError, match=r"TensorRT-RTX ended unasked \(SIGKILL"):
            worker.call("version")


@pytest.mark.slow
def test_one_command_builds_and_validates(tmp_path: Path) -> None:
    from tiny_models import save_tiny_model

    save_tiny_model("qwen2", tmp_path / "model", num_hidden_layers=2)
    command = [sys.executable, "-m", "sedac_export.cli"]
    build = [*command, "build", "--model", str(tmp_path / "model"), "--precision", "fp16"]
    build += ["--target", RTX, "--target", "onnxruntime", "--output", str(tmp_path / "bundle")]
    done = subprocess.run(build, capture_output=True, text=True, check=True)
    assert "7 plans" in done.stderr
    validate = [*command, "validate", str(tmp_path / "bundle"), "--json"]
    done = subprocess.run(validate, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["passed"]
    assert report["targets"][RTX]["build_seconds"].keys() >= {"embed", "layer_001", "head"}

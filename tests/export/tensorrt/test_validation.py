"""What `sedac-export validate` catches: each defect as if it had been exported and built so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.portable_runner import PortableRunner
from sedac_export.bundle.target_check import FAILED, TargetValidation
from sedac_export.cli import app
from sedac_export.tensorrt import validate_plans as module
from sedac_export.tensorrt.profiles import graph_profiles
from sedac_export.tensorrt.validate_plans import validate
from sedac_export.tensorrt.worker import Worker
from sedac_runtime.flavour import Gpu, find_gpu

from .conftest import RTX, rewrite

LAYER = "onnx/portable_layer_001.onnx"


def problems(validation: TargetValidation) -> dict[str, list[str]]:
    return {check.name: check.problems for check in validation.checks if check.problems}


def test_sound_plans_pass(planned: Path) -> None:
    validation = validate(planned, RTX)
    structure, agreement, execution = validation.checks
    assert problems(validation) == {}
    assert validation.exit_code() == 0
    layers = bundle.read_manifest(planned).model.num_layers
    # embed, contexts and head, and of each layer two
    assert len(structure.engines) == 3 + 2 * layers
    assert [row["engine"] for row in agreement.engines][-1] == "end to end"
    assert agreement.engines[-1]["argmax_agreement"] >= 0.99
    if find_gpu() is None:
        assert execution.reason == (
            "no supported GPU: no NVIDIA GPU with its driver is found on this host"
        )


def renamed_output(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["cache" if n == "present_key_0" else n for n in node.output]
        node.input[:] = ["cache" if n == "present_key_0" else n for n in node.input]
    next(v for v in model.graph.output if v.name == "present_key_0").name = "cache"


def dropped_mask(model: onnx.ModelProto) -> None:
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    del attention.input[3]


def wrong_dtype(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if "y" in node.output)
    node.output[:] = ["y_half" if name == "y" else name for name in node.output]
    for other in model.graph.node:
        other.input[:] = ["y_half" if name == "y" else name for name in other.input]
    model.graph.node.append(helper.make_node("Cast", ["y_half"], ["y"], to=TensorProto.FLOAT))
    output = next(value for value in model.graph.output if value.name == "y")
    output.type.tensor_type.elem_type = TensorProto.FLOAT


def permuted_weights(model: onnx.ModelProto) -> None:
    weights = {i.name.split(".")[-2]: i for i in model.graph.initializer if "proj.w" in i.name}
    gate, up = weights["gate_proj"], weights["up_proj"]
    gate.name, up.name = up.name, gate.name


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (renamed_output, "structure", "portable_layer_001: output present_key_0 is missing"),
        (dropped_mask, "onnxruntime", "layer_001: cosine"),
        (wrong_dtype, "structure", "output y is float32 [-1, -1, "),
        (permuted_weights, "onnxruntime", "layer_001: cosine"),
    ],
)
def test_a_broken_graph_is_caught(
    change: Callable[[onnx.ModelProto], None], check: str, message: str, own_tiny: Path
) -> None:
    rewrite(own_tiny, LAYER, change)
    validation = validate(own_tiny, RTX)
    found = problems(validation)
    assert any(message in problem for problem in found[check])
    assert validation.exit_code() == min(FAILED[name] for name in found)


def test_a_plan_of_another_graph_is_caught(own_tiny: Path) -> None:
    """Two plans change places, and their digests with them."""
    manifest = bundle.read_manifest(own_tiny)
    plans = {Path(plan.file).stem: plan for plan in manifest.plans[RTX].plans}
    first, second = plans["layer_000"], plans["layer_001"]
    first.fingerprint, second.fingerprint = second.fingerprint, first.fingerprint
    bundle.write_manifest(own_tiny, manifest)
    found = problems(validate(own_tiny, RTX))["structure"]
    assert [problem.partition(":")[0] for problem in found] == [
        "portable_layer_000",
        "portable_layer_001",
    ]


def test_a_gpu_that_cannot_load_the_plans_is_said(
    planned_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_gpu", lambda: Gpu("H200", "9.0", "580.1"))
    execution = validate(planned_tiny, RTX).checks[2]
    assert not execution.checked
    assert execution.reason.startswith("no supported GPU: the plans are for GPUs of compute")
    assert "H200 has 9.0" in execution.reason


def test_a_gpu_on_which_plans_do_not_load_fails_the_check(
    planned_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to the GPU is gone to where there is none: its error is a failure, no crash."""
    if find_gpu() is not None:
        pytest.skip("there is a GPU on this host")
    monkeypatch.setattr(module, "find_gpu", lambda: Gpu("RTX 4090", "8.9", "580.1"))
    validation = validate(planned_tiny, RTX)
    assert validation.exit_code() == FAILED["execution"]
    assert all("deserializeCudaEngine" in problem for problem in validation.checks[2].problems)


class Stand:
    """Answers for a GPU: what plans would give, by their graphs in ONNX Runtime."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.profiles = directory, set[int]()
        self.graphs = {
            str(directory / plan.file): plan.graph
            for plan in bundle.read_manifest(directory).plans[RTX].plans
        }
        self.run_portable = PortableRunner(directory, "fp16")
        call = Worker.call

        def answer(worker: Worker, function: str, **arguments: Any) -> Any:
            if function == "inspect":
                network = call(
                    worker, "describe", graph=str(directory / self.graphs[arguments["plan"]])
                )
                return network | self.inspect(self.graphs[arguments["plan"]])
            if function == "run":
                return self.run(**arguments)
            return call(worker, function, **arguments)

        monkeypatch.setattr(Worker, "call", answer)
        monkeypatch.setattr(module, "find_gpu", lambda: Gpu("RTX 4090", "8.9", "580.1"))

    def inspect(self, graph: str) -> dict[str, Any]:
        manifest = bundle.read_manifest(self.directory)
        options, length = manifest.plans[RTX].options, manifest.max_cache_length
        head = graph.endswith("head.onnx")
        model = onnx.load(self.directory / graph, load_external_data=False)
        return {
            "profiles": graph_profiles(self.directory / graph, options, length, head),
            "information": "".join(f"[ONNX Layer: {node.name}]" for node in model.graph.node),
        }

    def run(self, plan: str, profile: int, feeds: str, results: str) -> None:
        self.profiles.add(profile)
        with np.load(feeds) as arrays:
            np.savez(results, **self.run_portable(self.graphs[plan], dict(arrays)))


def test_execution_is_held_to_the_gates(own_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but TensorRT itself: profiles are chosen, caches carried, gates asked."""
    stand = Stand(own_tiny, monkeypatch)
    validation = validate(own_tiny, RTX)
    assert validation.exit_code() == 0
    execution = validation.checks[2]
    assert execution.checked
    assert [row["engine"] for row in execution.engines][-1] == "end to end"
    assert stand.profiles == {0, 1, 2}
    # an engine that computes something else
    first, second = (own_tiny / f"engines/{RTX}/layer_00{layer}.plan" for layer in (0, 1))
    stand.graphs[str(first)] = stand.graphs[str(second)]
    validation = validate(own_tiny, RTX)
    assert validation.exit_code() == FAILED["execution"]
    assert any("layer_000" in problem for problem in validation.checks[2].problems)


def test_an_engine_with_other_profiles_or_layers_is_caught(
    own_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(own_tiny, monkeypatch)
    inspect = stand.inspect
    stand.inspect = lambda graph: inspect(graph) | {"information": ""}  # type: ignore[method-assign]
    found = problems(validate(own_tiny, RTX))
    assert list(found) == ["execution"]
    assert "layer_000: its engine lacks the layer [ONNX Layer: " in found["execution"][0]
    stand.inspect = lambda graph: inspect(graph) | {"profiles": inspect(graph)["profiles"][:1]}  # type: ignore[method-assign]
    found = problems(validate(own_tiny, RTX))
    assert "embed: 1 profiles instead of 3" in found["execution"]


@pytest.mark.gpu
def test_plans_run_on_the_gpu(planned: Path) -> None:
    execution = validate(planned, RTX).checks[2]
    if not execution.checked:
        pytest.skip(execution.reason)
    assert execution.problems == []


def test_the_command_prints_one_object_and_its_exit_code_says_what_failed(own_tiny: Path) -> None:
    rewrite(own_tiny, LAYER, permuted_weights)
    run = CliRunner().invoke(app, ["validate", str(own_tiny), "--json"])
    assert run.exit_code == FAILED["onnxruntime"]
    report = json.loads(run.stdout)
    assert not report["passed"]
    checks = report["targets"][RTX]["checks"]
    assert checks["structure"]["passed"]
    assert not checks["onnxruntime"]["passed"]
    assert checks["execution"]["passed"] is None or checks["execution"]["checked"]


def test_a_bundle_without_plans_says_how_to_add_them(demo_bundle: Path) -> None:
    run = CliRunner().invoke(app, ["validate", str(demo_bundle)])
    assert "holds no engines for GPUs; add them with sedac-export engines" in str(run.exception)

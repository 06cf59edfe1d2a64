"""The target onnxruntime-cuda in a bundle."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from bad_input.command import Command, assert_one_line_error, call
from build_cache import BuildCache
from onnx import TensorProto
from tiny_models import save_tiny_model

import sedac_export.cli
from sedac_export import BuildRequest
from sedac_export.bundle.manifest import read_manifest
from sedac_export.device_graphs.onnxruntime_cuda import add_onnxruntime_cuda

# what the CUDA provider of ONNX Runtime has no kernels for, and what it does not fuse
ABSENT = {"SplitToSequence", "SequenceAt", "Shape"}


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: call(sedac_export.cli.main, [str(a) for a in arguments], capfd)


@pytest.fixture
def tiny(build_cache: BuildCache, tmp_path: Path) -> Callable[..., Path]:
    def get(name: str, **settings: object) -> Path:
        save_tiny_model(name, tmp_path / "model")
        wanted = {"precision": "fp16"} | settings
        return build_cache.bundle(
            BuildRequest(str(tmp_path / "model"), tmp_path / "bundle", **wanted)  # type: ignore[arg-type]
        )

    return get


def graphs_of(bundle: Path) -> dict[str, onnx.GraphProto]:
    entry = read_manifest(bundle).onnxruntime_cuda
    assert entry is not None
    files = {Path(file).stem: bundle / file for file in entry.files()}
    return {n: onnx.load(file, load_external_data=False).graph for n, file in files.items()}


@pytest.mark.parametrize("layers_per_engine", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_graphs_have_kernels(layers_per_engine: int, tiny: Callable[..., Path]) -> None:
    """GPT-2 splits its fused projection. A block's inner residual streams are its own alone."""
    bundle = tiny("gpt2", layers_per_engine=layers_per_engine)
    add_onnxruntime_cuda(bundle, str(bundle.parent / "model"))
    entry = read_manifest(bundle).onnxruntime_cuda
    assert entry is not None and entry.masks == {}
    assert {layer.stability for layer in entry.layers} == {layers_per_engine > 1}
    for name, graph in graphs_of(bundle).items():
        assert not ABSENT & {node.op_type for node in graph.node}, name
        outputs = [value.name for value in graph.output]
        if name.startswith(("cuda_layer", "cuda_block")):
            assert ("stability" in outputs) == (layers_per_engine > 1)
            types = {v.name: v.type.tensor_type.elem_type for v in graph.input}
            assert types["x"] == types["past_key_0"] == TensorProto.FLOAT16


def test_graphs_point_at_the_bundles_weights(tiny: Callable[..., Path]) -> None:
    bundle = tiny("llama")
    before = {path.name for path in bundle.rglob("*.data")}
    add_onnxruntime_cuda(bundle, str(bundle.parent / "model"))
    first = read_manifest(bundle)
    assert {path.name for path in bundle.rglob("*.data")} == before
    operators = {node.op_type for node in graphs_of(bundle)["cuda_layer_000"].node}
    assert "SimplifiedLayerNormalization" in operators and "RMSNormalization" not in operators
    add_onnxruntime_cuda(bundle, str(bundle.parent / "model"))
    assert read_manifest(bundle) == first


def test_what_it_needs_is_said(tiny: Callable[..., Path], export: Command, tmp_path: Path) -> None:
    bundle = tiny("llama")
    target = ("--target", "onnxruntime-cuda")
    assert_one_line_error(export("engines", bundle, *target), "name the model with --model")
    model = str(tmp_path / "model")
    single = export("build", "--model", model, "--output", tmp_path / "fp32", *target)
    assert_one_line_error(single, "takes fp16 or bf16 weights, and these are fp32")
    assert not (tmp_path / "fp32").exists()
    assert_one_line_error(export("validate", bundle, *target), "holds no onnxruntime-cuda engines")

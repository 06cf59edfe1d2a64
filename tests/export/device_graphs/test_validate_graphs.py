"""`sedac-export validate --target onnxruntime-cuda` on a host without a GPU."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from build_cache import BuildCache
from tiny_models import save_tiny_model

from sedac_export import BuildRequest, SedacError
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.manifest import read_manifest
from sedac_export.bundle.target_check import FAILED
from sedac_export.device_graphs import validate_graphs
from sedac_export.device_graphs.onnxruntime_cuda import add_onnxruntime_cuda
from sedac_export.device_graphs.validate_graphs import validate


@pytest.fixture(scope="module")
def with_graphs(
    build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    def get(name: str, precision: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        save_tiny_model(name, directory / "model")
        request = BuildRequest(str(directory / "model"), directory / "bundle", precision)  # type: ignore[arg-type]
        built = build_cache.bundle(request)
        add_onnxruntime_cuda(built, str(directory / "model"))
        return built

    return get


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_graphs, "find_gpu", lambda: None)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("qwen2", "fp16"), ("qwen2", "bf16"), ("gemma2", "fp16"), ("gpt2", "fp16")],
)
def test_sound_graphs_pass(
    name: str, precision: str, with_graphs: Callable[[str, str], Path]
) -> None:
    validation = validate(with_graphs(name, precision))
    structure, onnxruntime, execution = validation.checks
    assert validation.exit_code() == 0, validation.summary()
    assert {row["engine"] for row in onnxruntime.engines} >= {"embed", "head", "end to end"}
    assert len(structure.engines) > 4
    assert not execution.checked and "no NVIDIA GPU" in execution.reason


def test_a_graph_that_computes_something_else_fails(
    with_graphs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(with_graphs("qwen2", "fp16"), tmp_path / "bundle")

    def change(model: onnx.ModelProto) -> None:
        (norm, *_) = (n for n in model.graph.node if n.op_type == "SimplifiedLayerNormalization")
        (epsilon,) = (a for a in norm.attribute if a.name == "epsilon")
        epsilon.f = 10.0

    change_layer(directory, change)
    validation = validate(directory)
    assert validation.exit_code() == FAILED["onnxruntime"]
    assert any("layer_000" in problem for problem in validation.checks[1].problems)


def test_a_graph_without_caches_fails(
    with_graphs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(with_graphs("qwen2", "fp16"), tmp_path / "bundle")

    def change(model: onnx.ModelProto) -> None:
        kept = [value for value in model.graph.output if value.name != "present_key_0"]
        del model.graph.output[:]
        model.graph.output.extend(kept)

    change_layer(directory, change)
    validation = validate(directory)
    assert validation.exit_code() == FAILED["structure"]
    assert validation.checks[0].problems == ["cuda_layer_000: it does not give present_key_0"]


def test_a_bundle_without_them_says_how_to_add_them(
    with_graphs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(with_graphs("qwen2", "fp16"), tmp_path / "bundle")
    bundle.write_manifest(
        directory, read_manifest(directory).model_copy(update={"onnxruntime_cuda": None})
    )
    with pytest.raises(SedacError, match=r"engines .* --target onnxruntime-cuda"):
        validate(directory)


def change_layer(directory: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the first layer's graph, and what the manifest says of its file."""
    manifest = read_manifest(directory)
    assert manifest.onnxruntime_cuda is not None
    file = manifest.onnxruntime_cuda.layers[0].file
    model = onnx.load(directory / file, load_external_data=False)
    change(model)
    onnx.save(model, directory / file)
    files = manifest.files | {file: bundle.file_entry(directory, file)}
    bundle.write_manifest(directory, manifest.model_copy(update={"files": files}))

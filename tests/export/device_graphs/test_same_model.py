"""A model that is not the bundle's is refused, though its weights have those names and shapes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_input.command import Command, assert_one_line_error, call, snapshot
from build_cache import BuildCache
from conftest import DEMO_MODEL
from tiny_models import save_tiny_model

import sedac_export.cli
from export.conftest import TrainedBundle
from sedac_export import BuildRequest
from sedac_export.bundle.manifest import read_manifest
from sedac_export.device_graphs import same_model

# weights as large as trained ones are, so that activations show
NAME, LARGE = "mistral", {"initializer_range": 0.2}
# as the bundle's up to positions that only long texts reach
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16384,
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rope_theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "contexts"),
    "rope scaled late": ({"rope_parameters": SCALED}, "contexts"),
    "rms_norm_eps": ({"rms_norm_eps": 3e-6}, "the norms' epsilon of layer 0 is 3e-06, the"),
    "hidden_act": ({"hidden_act": "gelu_pytorch_tanh"}, "layer_000"),
    "sliding_window": ({"sliding_window": 300}, "the window of layer 0 is 300, the"),
}


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: call(sedac_export.cli.main, [str(a) for a in arguments], capfd)


@pytest.fixture
def half(build_cache: BuildCache, tmp_path: Path) -> Path:
    save_tiny_model(NAME, tmp_path / "model", **LARGE)
    return build_cache.bundle(BuildRequest(str(tmp_path / "model"), tmp_path / "bundle", "fp16"))


def changed(directory: Path, settings: dict[str, Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("target", ["onnxruntime-cuda", "tensorrt-rtx"])
@pytest.mark.parametrize("setting", OTHERS)
def test_a_model_with_another_configuration_is_refused(
    target: str, setting: str, half: Path, export: Command, tmp_path: Path
) -> None:
    if target == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx", reason="of the extra sedac[tensorrt-rtx]")
    settings, reason = OTHERS[setting]
    changed(tmp_path / "model", settings)
    before = snapshot(half.parent)
    result = export("engines", half, "--target", target, "--model", tmp_path / "model")
    words = (f"is not the model that {half} was built from: ", reason, "give that one as --model")
    assert_one_line_error(result, *words)
    assert snapshot(half.parent) == before


def test_graphs_held_before_stay(half: Path, export: Command, tmp_path: Path) -> None:
    arguments = ("engines", half, "--target", "onnxruntime-cuda", "--model", tmp_path / "model")
    assert export(*arguments).code == 0
    changed(tmp_path / "model", {"rms_norm_eps": 3e-6})
    before = snapshot(half.parent)
    assert_one_line_error(export(*arguments), "is not the model that")
    assert snapshot(half.parent) == before


def test_a_build_does_not_compare_what_it_has_just_built(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_model, "compare", lambda *_: pytest.fail("it was compared"))
    save_tiny_model("qwen2", tmp_path / "model", num_hidden_layers=1)
    arguments = ("--model", tmp_path / "model", "--output", tmp_path / "bundle")
    options = ("--precision", "fp16", "--target", "onnxruntime-cuda")
    assert export("build", *arguments, *options).code == 0
    assert read_manifest(tmp_path / "bundle").onnxruntime_cuda is not None


@pytest.mark.parametrize("target", ["cuda", "onnxruntime-cuda"])
def test_probes_are_no_other_model(
    target: str, trained_bundle: TrainedBundle, export: Command, tmp_path: Path
) -> None:
    if target == "cuda":
        pytest.importorskip("cuda.bindings.nvrtc", reason="of the extra sedac[cuda]")
    bundle = shutil.copytree(trained_bundle[0], tmp_path / "bundle")
    assert any(engine.risk for engine in read_manifest(bundle).engines.layers)
    result = export("engines", bundle, "--target", target, "--model", DEMO_MODEL)
    assert result.code == 0, result.err

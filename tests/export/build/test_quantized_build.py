"""Building with --precision int8 and int4: what is stored, what is reported, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bad_input.command import assert_one_line_error, call, snapshot
from build_cache import BuildCache
from conftest import DEMO_MODEL, TinyBundle
from tiny_models import save_tiny_model

from sedac_export import BuildRequest, SedacError, build_bundle
from sedac_export.build.inspection import inspect_bundle
from sedac_export.build.quality import QualityRow
from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import QuantizedWeights, read_manifest
from sedac_export.cli import main
from sedac_export.cuda.weight_blocks import check_quantized
from sedac_export.device_graphs.onnxruntime_cuda import check_precision
from sedac_export.exits.training.head_graph import HeadGraph
from sedac_export.tensorrt.build_plans import check_quantization


def data_bytes(bundle: Path) -> int:
    return sum(path.stat().st_size for path in (bundle / "onnx").glob("*.data"))


def operators(bundle: Path, name: str) -> list[str]:
    model = onnx.load(bundle / "onnx" / f"{name}.onnx", load_external_data=False)
    return [node.op_type for node in model.graph.node]


def build(tmp_path: Path, name: str, **settings: Any) -> Path:
    if not (tmp_path / "model").exists():
        save_tiny_model(name, tmp_path / "model")
    output = tmp_path / "bundle"
    defaults = {"precision": "int4", "block_size": 16, "max_cache_length": 64, "force": True}
    build_bundle(BuildRequest(model=str(tmp_path / "model"), output=output, **defaults | settings))
    return output


def test_tied_weights_are_stored_once(
    tmp_path: Path, tiny_bundle: Callable[[str], TinyBundle]
) -> None:
    """4 bits a weight and a scale for 16 of them, against 32 bits: the head's place is the
    embedding's."""
    bundle = build(tmp_path, "qwen2")
    places = [
        {
            (e.key, e.value)
            for i in bundle.graph(f"onnx/{name}.onnx").graph.initializer
            if i.name.endswith(weight)
            for e in i.external_data
        }
        for bundle in [Bundle.open(bundle)]
        for name, weight in (("embed", "embed_tokens.weight"), ("head", "lm_head.weight"))
    ]
    assert places[0] == places[1] != set()
    padding = 4096 * (12 * 4 * 2 + 2)
    assert data_bytes(bundle) < data_bytes(tiny_bundle("qwen2")[1]) * 6 / 32 + padding


def test_the_build_is_exact_for_the_quantized_weights(tmp_path: Path) -> None:
    validation = json.loads((build(tmp_path, "llama") / "validation.json").read_text())
    assert validation["end_to_end"]["error"] < 1e-5
    assert validation["quality"] is None  # no tokenizer, no text


def test_layers_and_the_head_keep_their_precision(tmp_path: Path) -> None:
    bundle = build(tmp_path, "qwen2", keep_precision="head,2")
    quantization = read_manifest(bundle).quantization
    assert quantization is not None
    assert (quantization.kept_layers, quantization.kept_head) == ([2], True)
    assert "MatMulNBits" not in operators(bundle, "layer_002") + operators(bundle, "kv_002")
    assert "MatMulNBits" in operators(bundle, "layer_001")
    assert "Gemm" in operators(bundle, "head")
    assert operators(bundle, "embed") == ["Gather"]  # tied to the head


def test_quality_is_reported(build_cache: BuildCache, tmp_path: Path) -> None:
    """The demo model on texts that ship with Python."""
    found = {}
    for precision in ("int8", "int4"):
        request = BuildRequest(str(DEMO_MODEL), tmp_path / precision, precision)
        found[precision] = inspect_bundle(build_cache.bundle(request))["validation"]["quality"]
    for quality in found.values():
        assert quality["tokens"] == 8 * 256
        assert len(quality["engines"]) == 12 + 2
    eight, four = found["int8"], found["int4"]
    assert eight["original_perplexity"] == pytest.approx(four["original_perplexity"])
    assert 0 < eight["divergence"] < 0.01 < four["divergence"] < 1
    assert eight["agreement"] > four["agreement"] > 0.5
    assert abs(eight["perplexity"] / eight["original_perplexity"] - 1) < 0.02


def test_differences_are_relative_means() -> None:
    row = QualityRow("layer")
    expected = np.array([[[3.0, 4.0], [6.0, 8.0]]])
    row.add(expected * 1.5, expected)
    row.add(expected[:, :1], expected[:, :1])
    assert row.difference == pytest.approx(1 / 3)


def test_probes_read_the_quantized_head(tmp_path: Path) -> None:
    bundle = Bundle.open(build(tmp_path, "llama", symmetric=False))
    head = HeadGraph.load(bundle)
    tokens = np.array([7, 0, 255])
    rows = head.rows(tokens)
    x = np.random.default_rng(0).standard_normal((1, 1, 64)).astype(np.float32)
    import torch

    from sedac_export.bundle.runner import BundleRunner
    from sedac_export.exits.training.head_torch import TorchHead

    torch_head = TorchHead(head, bundle.directory / "onnx")
    logits = torch_head(torch.from_numpy(x[0])).numpy()
    shipped = BundleRunner.of(bundle).head(x)[0]
    assert rows.shape == (3, 64)
    np.testing.assert_allclose(logits, shipped, atol=0.02 * np.abs(logits).max())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"block_size": 48}, "--block-size 48 is none of 16, 32, 64, 128, 256"),
        ({"block_size": 128}, "rows of 64 numbers are no whole blocks of 128"),
        ({"keep_precision": "4"}, "--keep-precision 4 is neither head nor one of this model's"),
        ({"keep_precision": "tail"}, "--keep-precision tail is neither head nor"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(SedacError, match=reason):
        build(tmp_path, "qwen2", **settings)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        ("--block-size", {"block_size": 64}),
        ("--asymmetric", {"symmetric": False}),
        ("--method", {"method": "gptq"}),
        ("--keep-precision", {"keep_precision": "head"}),
        ("--data", {"data": [Path("text")]}),
    ],
)
def test_options_of_quantized_builds_are_not_ignored(
    option: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SedacError, match=f"{option} is for --precision int8 and int4.*fp16"):
        build_bundle(BuildRequest("model", tmp_path / "bundle", precision="fp16", **settings))


def test_short_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    request = BuildRequest(str(DEMO_MODEL), tmp_path / "b", "int4", data=[tmp_path / "short.txt"])
    with pytest.raises(SedacError, match=r"short\.txt has \d+ tokens, and at least 512"):
        build_bundle(request)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_targets_that_take_no_quantized_weights_say_so(precision: Any) -> None:
    with pytest.raises(SedacError, match=f"{precision}; build with --precision fp16"):
        check_precision(precision)


def test_tensorrt_takes_symmetric_blocks_of_4_bits_alone() -> None:
    check_quantization("tensorrt-rtx", "int4", symmetric=True)
    with pytest.raises(SedacError, match=r"no negative scales of blocks of 8 bits.*; build with"):
        check_quantization("tensorrt-rtx", "int8", symmetric=True)
    with pytest.raises(SedacError, match=r"takes no zero points; build with --symmetric"):
        check_quantization("tensorrt-rtx", "int4", symmetric=False)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"block_size": 16}, "in blocks of 32.*are of 16; build with --block-size 32"),
        ({"kept_layers": [3]}, "all quantized alike; build without --keep-precision"),
        ({"kept_head": True}, "all quantized alike; build without --keep-precision"),
    ],
)
def test_cuda_refuses_blocks_that_its_kernel_cannot_hold(
    settings: dict[str, Any], reason: str
) -> None:
    fields: dict[str, Any] = {"block_size": 64, "symmetric": True, "method": "rtn"}
    check_quantized(QuantizedWeights(**fields))
    with pytest.raises(SedacError, match=reason):
        check_quantized(QuantizedWeights(**fields | settings))


def test_calibration_needs_text(tmp_path: Path) -> None:
    with pytest.raises(SedacError, match="has no tokenizer; build with --method rtn"):
        build(tmp_path, "llama", method="gptq")


@pytest.mark.slow
def test_calibrated_layers_are_nearer_the_original(build_cache: BuildCache, tmp_path: Path) -> None:
    """The texts that are compared on are none of those that are calibrated on."""
    found = {}
    for name, settings in (
        ("rtn", {}),
        ("gptq", {"method": "gptq"}),
        ("head", {"method": "gptq", "keep_precision": "head"}),
    ):
        request = BuildRequest(str(DEMO_MODEL), tmp_path / name, "int4", **settings)
        found[name] = inspect_bundle(build_cache.bundle(request))["validation"]["quality"]
    assert found["gptq"]["divergence"] < 0.9 * found["rtn"]["divergence"]
    assert found["head"]["divergence"] < 0.95 * found["gptq"]["divergence"]
    # a kept head is exact, and so is the embedding that it is tied to
    differences = {row["engine"]: row["difference"] for row in found["head"]["engines"]}
    assert max(differences["embed"], differences["head"]) < 1e-5 < differences["layer_000"]
    kept, quantized = (operators(tmp_path / name, "head") for name in ("head", "gptq"))
    assert "MatMulNBits" in quantized and "MatMulNBits" not in kept
    assert "MatMulNBits" in operators(tmp_path / "head", "layer_011")


def test_commands_about_other_engines_say_why_not(
    build_cache: BuildCache, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = build_cache.bundle(BuildRequest(str(DEMO_MODEL), tmp_path / "bundle", "int4"))
    for command, words in (
        (["upgrade", bundle], ["needs no upgrade"]),
        (["engines", bundle, "--target", "cuda"], ["name the model with --model"]),
        (["engines", bundle, "--target", "onnxruntime-cuda"], ["int4", "--precision fp16"]),
        (["validate", bundle], ["holds no engines for GPUs"]),
    ):
        before = snapshot(bundle)
        assert_one_line_error(call(main, list(map(str, command)), capfd), *words)
        assert snapshot(bundle) == before
    shown = call(main, ["inspect", str(bundle)], capfd)
    assert "quantized by rtn, symmetric blocks of 32" in shown.out
    assert "no CUDA chain; sedac-export engines BUNDLE --target cuda" in shown.out


def test_inspect_says_that_the_kernel_takes_no_kept_weights(
    build_cache: BuildCache, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    request = BuildRequest(str(DEMO_MODEL), tmp_path / "bundle", "int4", keep_precision="head")
    shown = call(main, ["inspect", str(build_cache.bundle(request))], capfd)
    assert "no CUDA chain: --target cuda takes weights that are all quantized alike" in shown.out

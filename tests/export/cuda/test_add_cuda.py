"""The target cuda in a bundle, compiled from a stand-in for the chain."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input.command import Result, assert_one_line_error, call, snapshot
from conftest import THREADS
from tiny_models import save_tiny_model

import sedac_export.cli
from sedac_export import SedacError
from sedac_export.build import exporter
from sedac_export.bundle import Bundle
from sedac_export.bundle.edit import edited_bundle
from sedac_export.bundle.manifest import Manifest, read_manifest
from sedac_export.cuda import compiler
from sedac_export.cuda.add_cuda import add_cuda
from sedac_export.cuda.compiler import ARCHITECTURES, Compiler, chain_macros, fingerprint
from sedac_export.cuda.weight_blocks import HalfBlocks
from sedac_runtime import SedacModel

from .conftest import HalfBundle

FILES = ["chain-compute_120.ptx", *(f"chain-{name}.cubin" for name in ARCHITECTURES)]
ALL = sorted([*FILES, "weights.safetensors"])

Run = Callable[..., Result]

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: call(sedac_export.cli.main, [str(a) for a in arguments], capfd)


def target_files(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / "engines" / "cuda").iterdir())


def test_a_bundle_has_the_chain_among_its_checked_files(half_bundle: HalfBundle) -> None:
    model, directory = half_bundle("gemma3")
    chain = add_cuda(directory, str(model))
    manifest = Bundle.open(directory).manifest
    assert manifest.cuda == chain
    assert manifest.cuda_refusal is None
    assert target_files(directory) == ALL
    assert {f"engines/cuda/{name}" for name in ALL} <= manifest.files.keys()
    assert [module.file for module in chain.modules] == [
        *(f"engines/cuda/chain-{name}.cubin" for name in ARCHITECTURES),
        "engines/cuda/chain-compute_120.ptx",
    ]
    assert chain.weights == "engines/cuda/weights.safetensors"
    assert [(layer.window, layer.rotary) for layer in chain.layers] == [(50, 0), (0, 1)]
    vectors = ["query_norm", "mlp_post_norm"]
    macros = chain_macros(chain.shape, chain.options, 2, vectors, HalfBlocks())
    assert chain.fingerprint == fingerprint(macros)
    assert chain.compiler == Compiler().version
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def generated(directory: Path) -> list[int]:
    model = SedacModel.from_pretrained(directory, threads=THREADS)
    return list(model.generate([5, 6, 7], max_new_tokens=8).tokens)


def test_the_bundle_runs_as_before(half_bundle: HalfBundle) -> None:
    model, directory = half_bundle("qwen2")
    before = generated(directory)
    add_cuda(directory, str(model))
    assert generated(directory) == before


def test_the_kernel_is_compiled_anew_without_the_model(
    half_bundle: HalfBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, directory = half_bundle("qwen3")
    first = add_cuda(directory, str(model))
    weights = (directory / first.weights).read_bytes()
    for path in compiler.KERNELS.iterdir():
        (tmp_path / path.name).write_text(path.read_text() + "// newer\n")
    monkeypatch.setattr(compiler, "KERNELS", tmp_path)
    second = add_cuda(directory)
    assert second.fingerprint != first.fingerprint
    assert second.model_copy(update={"fingerprint": first.fingerprint}) == first
    assert (directory / first.weights).read_bytes() == weights
    assert Bundle.open(directory).manifest.cuda == second


@pytest.mark.slow
def test_damaged_files_are_made_anew_with_the_model(half_bundle: HalfBundle) -> None:
    model, directory = half_bundle("mistral")
    chain = add_cuda(directory, str(model))
    (directory / chain.weights).write_bytes(b"cut off")
    (directory / chain.modules[0].file).unlink()
    with pytest.raises(SedacError):
        add_cuda(directory)
    add_cuda(directory, str(model))
    assert Bundle.open(directory).manifest.cuda == chain


def test_a_stopped_build_leaves_the_bundle_as_it_was(
    half_bundle: HalfBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = half_bundle("mistral")
    add_cuda(directory, str(model))
    before = snapshot(directory.parent)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sedac_export.cuda.add_cuda.write_weights", stopped)
    with pytest.raises(KeyboardInterrupt):
        add_cuda(directory, str(model))
    assert snapshot(directory.parent) == before


def test_edits_of_a_bundle_keep_the_chain(half_bundle: HalfBundle) -> None:
    model, directory = half_bundle("mistral")
    chain = add_cuda(directory, str(model))
    inode = (directory / chain.weights).stat().st_ino
    with edited_bundle(Bundle.open(directory)):
        pass
    assert Bundle.open(directory).manifest.cuda == chain
    assert (directory / chain.weights).stat().st_ino == inode


@pytest.mark.slow
def test_why_a_model_cannot_have_it_is_remembered(half_bundle: HalfBundle, export: Run) -> None:
    model, directory = half_bundle("gpt2")
    result = export("engines", directory, "--target", "cuda", "--model", model)
    assert_one_line_error(result, "the cuda target cannot run this model", "ln_1 is a LayerNorm")
    reason = "ln_1 is a LayerNorm, which is no RMS norm"
    assert read_manifest(directory).cuda_refusal == reason
    assert not (directory / "engines").exists()
    shown = export("inspect", directory)
    assert shown.code == 0
    assert f"no CUDA chain: {reason}" in shown.out
    facts = json.loads(export("inspect", directory, "--json").out)
    assert (facts["cuda"], facts["cuda_refusal"]) == (
        None,
        "ln_1 is a LayerNorm, which is no RMS norm",
    )


def test_the_commands_build_and_show_it(
    half_bundle: HalfBundle, export: Run, tmp_path: Path
) -> None:
    model, directory = half_bundle("llama")
    assert (
        "no CUDA chain; sedac-export engines BUNDLE --target cuda --model MODEL adds it"
        in export("inspect", directory).out
    )
    result = export("engines", directory, "--target", "cuda", "--model", model)
    assert result.code == 0
    expected = f"CUDA chain for {', '.join(ARCHITECTURES)}, compute_120, compiled by NVRTC"
    assert expected in result.err
    assert expected in export("inspect", directory).out
    facts = json.loads(export("inspect", directory, "--json").out)
    assert facts["cuda"] == json.loads(read_manifest(directory).model_dump_json())["cuda"]
    built = tmp_path / "built"
    options = ("--precision", "fp16", "--target", "cuda")
    assert export("build", "--model", model, "--output", built, *options).code == 0
    assert read_manifest(built).cuda == read_manifest(directory).cuda


def test_other_precisions_are_refused_before_anything_is_built(
    half_bundle: HalfBundle, export: Run, tmp_path: Path
) -> None:
    model, _ = half_bundle("llama")
    built = tmp_path / "built"
    options = ("--precision", "fp32", "--target", "cuda")
    result = export("build", "--model", model, "--output", built, *options)
    assert_one_line_error(result, "these are fp32", "--precision fp16")
    assert not built.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--block-size", "16"], ["blocks of 32", "of 16", "--block-size 32"]),
        (["--keep-precision", "head"], ["quantized alike", "without --keep-precision"]),
        (["--keep-precision", "0,3"], ["quantized alike", "without --keep-precision"]),
    ],
)
def test_weights_that_the_kernel_cannot_hold_are_refused_before_anything_is_built(
    export: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.setattr(exporter, "build_bundle", lambda *_: pytest.fail("it was built"))
    arguments = ("--model", tmp_path / "model", "--output", tmp_path / "new" / "bundle")
    result = export("build", *arguments, "--precision", "int4", "--target", "cuda", *options)
    assert_one_line_error(result, "--target cuda", *words)
    assert not list(tmp_path.iterdir())


def test_without_a_chain_the_model_must_be_named(half_bundle: HalfBundle, export: Run) -> None:
    _, directory = half_bundle("llama")
    before = snapshot(directory)
    result = export("engines", directory, "--target", "cuda")
    assert_one_line_error(result, "name the model with --model")
    assert snapshot(directory) == before


def test_a_model_of_other_depth_is_refused(
    half_bundle: HalfBundle, export: Run, tmp_path: Path
) -> None:
    _, directory = half_bundle("llama")
    save_tiny_model("llama", tmp_path / "shallow", num_hidden_layers=2)
    result = export("engines", directory, "--target", "cuda", "--model", tmp_path / "shallow")
    assert_one_line_error(
        result, "is not the model that", "its number of layers is 2, the bundle's 4"
    )


def test_a_model_of_another_kind_takes_nothing_away(
    half_bundle: HalfBundle, export: Run, tmp_path: Path
) -> None:
    model, directory = half_bundle("llama")
    add_cuda(directory, str(model))
    before = snapshot(directory)
    save_tiny_model("gpt2", tmp_path / "gpt2")
    result = export("engines", directory, "--target", "cuda", "--model", tmp_path / "gpt2")
    assert_one_line_error(result, "its type is gpt2, the bundle's llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    result = export("engines", directory, "--target", "cuda", "--model", model)
    assert_one_line_error(result, "the kernel runs the bundle's, and not this one")
    assert snapshot(directory) == before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rotary tables"),
        ({"rms_norm_eps": 3e-6}, "the norms' epsilon of layer 0 is 3e-06, the bundle's 1e-06"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "layer_000: cosine"),
        ({"sliding_window": 300}, "the window of layer 0 is 300, the bundle's 9"),
    ],
)
def test_a_model_with_another_configuration_is_refused(
    settings: dict[str, Any], reason: str, half_bundle: HalfBundle, export: Run
) -> None:
    model, directory = half_bundle("mistral")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    before = snapshot(directory.parent)
    result = export("engines", directory, "--target", "cuda", "--model", model)
    assert_one_line_error(result, "the model that", "was built from", reason)
    assert snapshot(directory.parent) == before


def test_a_link_out_of_the_bundle_is_refused(half_bundle: HalfBundle, tmp_path: Path) -> None:
    model, directory = half_bundle("mistral")
    (tmp_path / "elsewhere").mkdir()
    (directory / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SedacError, match="leads out of the bundle"):
        add_cuda(directory, str(model))
    assert list((tmp_path / "elsewhere").iterdir()) == []

"""ONNX Runtime's graphs for GPUs, run on the host, where its CPU provider takes the CUDA provider's
place; and what is said where that cannot be loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from build_cache import BuildCache
from conftest import DEMO_MODEL, THREADS
from tiny_models import save_tiny_model

from sedac_export import BuildRequest
from sedac_export.build.inspection import inspect_bundle
from sedac_export.device_graphs.onnxruntime_cuda import add_onnxruntime_cuda
from sedac_runtime import BundleError, EngineError, InputError, SedacModel, _core, cuda_libraries
from sedac_runtime.cuda_libraries import load_cuda_libraries, needed
from sedac_runtime.library import find_onnxruntime

PROMPT = list(range(1, 41))
ARCHITECTURES = ("gpt2", "opt", "gpt_neox", "phi3")


def on_host(bundle: Path) -> SedacModel:
    core = _core.Model(bundle, find_onnxruntime(), THREADS, device="host")
    return SedacModel(bundle, core)


@pytest.fixture(scope="session")
def tiny_with_graphs(
    build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    def get(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        save_tiny_model(name, directory / "model")
        request = BuildRequest(
            model=str(directory / "model"), output=directory / "bundle", precision="fp16"
        )
        bundle = build_cache.bundle(request)
        add_onnxruntime_cuda(bundle, str(directory / "model"))
        return bundle

    return get


@pytest.fixture(scope="session")
def demo_with_graphs(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("graphs") / "bundle"
    shutil.copytree(demo_bundle, directory)
    add_onnxruntime_cuda(directory, str(DEMO_MODEL))
    return directory


def assert_same_decisions(ours: SedacModel, theirs: SedacModel) -> None:
    """fp16 against fp32 after one text: nearly every token and exit; lossless is full depth."""
    settings = {"max_new_tokens": 64, "stop_tokens": []}
    text = theirs.generate(PROMPT, mode="full", **settings).tokens
    for kv_fill in ("propagate", "defer"):
        got, wanted = (model.follow(text, tau=0.9, kv_fill=kv_fill) for model in (ours, theirs))
        for one, other in zip(got, wanted, strict=True):
            assert sum(a == b for a, b in zip(one, other, strict=True)) >= 0.9 * len(other)
    full = ours.generate(PROMPT, mode="full", **settings).tokens
    for drafter in ("early-exit", "prompt-lookup"):
        lossless = ours.generate(PROMPT, mode="lossless", drafter=drafter, **settings)
        assert lossless.tokens == full
    exits = [1, ours.num_layers, 2]
    forced = ours.generate(PROMPT, forced_exit=exits, kv_fill="defer", **settings)
    assert forced.exit_layers[1:4] == exits


@pytest.mark.rotating
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_graphs_decide_as_the_engines_for_cpus(
    name: str, tiny_with_graphs: Callable[[str], Path]
) -> None:
    bundle = tiny_with_graphs(name)
    assert_same_decisions(on_host(bundle), SedacModel.from_pretrained(bundle, threads=THREADS))


def test_the_demo_decides_as_on_the_cpu(demo_with_graphs: Path, demo_model: SedacModel) -> None:
    model = on_host(demo_with_graphs)
    assert (model.backend, model.device) == ("onnxruntime", "cuda")
    assert_same_decisions(model, demo_model)


def test_prompts_longer_than_a_pass(demo_with_graphs: Path, demo_model: SedacModel) -> None:
    """Passes of 256 tokens are not replayed, and attention goes on where the last one ended."""
    prompt = [index % 200 + 1 for index in range(600)]
    ours, theirs = (
        each.generate(prompt, mode="full", max_new_tokens=16, stop_tokens=[])
        for each in (on_host(demo_with_graphs), demo_model)
    )
    assert ours.tokens == theirs.tokens


def test_graphs_must_be_there(demo_bundle: Path) -> None:
    with pytest.raises(
        BundleError, match="sedac-export engines --target onnxruntime-cuda and --model"
    ):
        on_host(demo_bundle)


def test_inspect_shows_them(demo_with_graphs: Path, demo_bundle: Path) -> None:
    shown = [
        inspect_bundle(bundle)["onnxruntime_cuda"] for bundle in (demo_with_graphs, demo_bundle)
    ]
    assert shown == [True, False]


def test_graphs_are_not_certified(demo_with_graphs: Path) -> None:
    output = on_host(demo_with_graphs).generate([1], mode="exit", max_new_tokens=1)
    assert output.certificate is None


def test_devices_are_onnxruntimes(demo_bundle: Path) -> None:
    with pytest.raises(InputError, match="device tpu is out of range: cpu or cuda"):
        SedacModel.from_pretrained(demo_bundle, device="tpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device cuda belongs to backend onnxruntime"):
        SedacModel.from_pretrained(demo_bundle, backend="auto", device="cuda")
    model = SedacModel.from_pretrained(demo_bundle, threads=THREADS, device="cpu")
    assert model.device == "cpu"


def test_libraries_that_one_is_linked_to() -> None:
    assert "libc.so.6" in needed(Path(_core.__file__))


def test_an_onnxruntime_for_cpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"libonnxruntime\.so\.1 is the ONNX Runtime for CPUs"):
        load_cuda_libraries(tmp_path / "libonnxruntime.so.1")


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("libcuda.so.99", "it comes with NVIDIA's driver; use --device cpu"),
        ("libcublasLt.so.99", r"pip install 'sedac-runtime\[gpu\]', or use --device cpu"),
    ],
)
def test_what_is_missing_is_named(
    missing: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libonnxruntime_providers_cuda.so").touch()
    monkeypatch.setattr(cuda_libraries, "needed", lambda _: ["libc.so.6", missing])
    with pytest.raises(EngineError, match=f"needs {missing}, which is not installed.*{remedy}"):
        load_cuda_libraries(tmp_path / "libonnxruntime.so.1")


def test_missing_cudnn_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider is not linked to it, and fails without it when a session is made."""
    (tmp_path / "libonnxruntime_providers_cuda.so").touch()
    monkeypatch.setattr(cuda_libraries, "needed", lambda _: [])
    monkeypatch.setattr(cuda_libraries, "_CUDNN", "libcudnn.so.99")
    with pytest.raises(EngineError, match=r"needs libcudnn\.so\.99"):
        load_cuda_libraries(tmp_path / "libonnxruntime.so.1")


def test_libraries_are_found_in_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libonnxruntime_providers_cuda.so").touch()
    monkeypatch.setattr(cuda_libraries, "needed", lambda _: ["libof_a_wheel.so.1"])
    monkeypatch.setattr(cuda_libraries, "_CUDNN", "libc.so.6")
    wheel = tmp_path / "nvidia" / "cu99" / "lib"
    wheel.mkdir(parents=True)
    shutil.copy(_core.__file__, wheel / "libof_a_wheel.so.1")
    monkeypatch.syspath_prepend(tmp_path)
    load_cuda_libraries(tmp_path / "libonnxruntime.so.1")

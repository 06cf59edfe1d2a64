"""Bundles that many tests share, built once, and what makes a run of many tests fast."""

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from build_cache import BuildCache
from conftest import DEMO_MODEL, THREADS, TinyBundle
from tiny_models import save_tiny_model
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import AutoModelForCausalLM, PreTrainedModel

import sedac_runtime.model
from sedac_export import BuildRequest
from sedac_export.build import exporter
from sedac_export.device_graphs import onnxruntime_cuda
from sedac_export.tensorrt import portable_writer
from sedac_runtime import SedacModel

torch.set_num_threads(THREADS)
# tracing makes so many objects that looking for garbage among them takes a tenth of its time
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def build_cache(pytestconfig: pytest.Config) -> BuildCache:
    """Builds that are the same for every test, shared by all workers and runs of this checkout."""
    assert pytestconfig.cache is not None
    cache = BuildCache(pytestconfig.cache.mkdir("builds"))
    cache.prune()
    return cache


@pytest.fixture(scope="session", autouse=True)
def default_threads() -> Iterator[None]:
    """Commands that run in this process take as many threads as the tests: it can have but one
    number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sedac_runtime.model, "default_threads", lambda: THREADS)
        yield


@pytest.fixture(scope="session", autouse=True)
def cached_traces(build_cache: BuildCache) -> Iterator[None]:
    """Trace each model once: that is most of the time that a build takes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (exporter, onnxruntime_cuda, portable_writer):
            patch.setattr(module, "trace_graphs", build_cache.tracing(module.trace_graphs))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_operator_registry() -> Iterator[None]:
    """torch.onnx reads its table of operators for each graph: half of the time of tracing one."""
    read = functools.cache(ONNXRegistry.from_torchlib)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(read))
        yield


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether samples are to be small: where a test repeats one check over many inputs."""
    return bool(pytestconfig.option.quick)


@pytest.fixture(scope="session")
def tiny_bundle(
    build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TinyBundle]:
    """A random model of the named architecture, and its bundle."""
    built: dict[str, TinyBundle] = {}

    def get(name: str) -> TinyBundle:
        if name not in built:
            directory = tmp_path_factory.mktemp(name)
            model = save_tiny_model(name, directory / "model")
            request = BuildRequest(model=str(directory / "model"), output=directory / "bundle")
            built[name] = (model, build_cache.bundle(request))
        return built[name]

    return get


@pytest.fixture(scope="session")
def demo_bundle(build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's bundle, weights stored in fp16."""
    output = tmp_path_factory.mktemp("demo") / "bundle"
    return build_cache.bundle(BuildRequest(model=str(DEMO_MODEL), output=output, precision="fp16"))


@pytest.fixture(scope="session")
def demo_model(demo_bundle: Path) -> SedacModel:
    """The demo bundle, loaded."""
    return SedacModel.from_pretrained(demo_bundle, threads=THREADS)


@pytest.fixture(scope="session")
def demo_reference() -> PreTrainedModel:
    """The demo model in transformers, fp32 and eager."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()

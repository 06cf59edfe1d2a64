"""Which tests a quick run leaves out, and bundles that many tests share, built once."""

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path

import pytest
import torch
from build_cache import BuildCache
from tiny_models import ARCHITECTURES, OTHERS, save_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import sedac_runtime.model
from sedac_export import BuildRequest
from sedac_export.build import exporter
from sedac_export.device_graphs import onnxruntime_cuda
from sedac_export.tensorrt import portable_writer
from sedac_runtime import SedacModel
from sedac_runtime.flavour import find_gpu

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
# threads of several workers that spin for the same cores hold each other up
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)

# architectures of each list that a quick run takes for the tests marked `rotating`
ROTATED = 3

TinyBundle = tuple[PreTrainedModel, Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sedac")
    group.addoption("--quick", action="store_true", help="only three architectures where marked")
    group.addoption("--day", type=int, help="which three --quick takes; by default today's")


def pytest_configure(config: pytest.Config) -> None:
    """Workers are given the options that result here, so that all of them collect the same."""
    if config.option.day is None:
        config.option.day = date.today().toordinal()


def pytest_report_header(config: pytest.Config) -> str | None:
    if not config.option.quick:
        return None
    names = ", ".join(sorted(in_rotation(config)))
    return f"quick run: rotating tests with --day {config.option.day}: {names}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.quick:
        return
    wanted = in_rotation(config)
    left_out = [item for item in items if is_left_out(item, wanted)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def is_left_out(item: pytest.Item, wanted: set[str]) -> bool:
    """Whether a quick run goes without this test."""
    if item.get_closest_marker("rotating"):
        assert isinstance(item, pytest.Function)
        return item.callspec.params["name"] not in wanted
    return item.get_closest_marker("slow") is not None


def in_rotation(config: pytest.Config) -> set[str]:
    """The architectures of the day. Every one has its turn within so many days as there are."""

    def chosen(names: Iterable[str]) -> list[str]:
        listed = list(names)
        first = ROTATED * config.option.day
        return [listed[(first + n) % len(listed)] for n in range(ROTATED)]

    return {*chosen(ARCHITECTURES), *chosen(OTHERS)}


def open_build_cache(config: pytest.Config) -> BuildCache:
    """The cache that all workers and runs of this checkout share."""
    assert config.cache is not None
    return BuildCache(config.cache.mkdir("builds"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Once for all workers."""
    if not hasattr(session.config, "workerinput"):
        open_build_cache(session.config).prune()


@pytest.fixture(scope="session")
def build_cache(pytestconfig: pytest.Config) -> BuildCache:
    """Builds that are the same for every test."""
    return open_build_cache(pytestconfig)


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


def require_chain() -> None:
    """Skip the test where the target cuda cannot be compiled or run."""
    for module in ("cuda.bindings.nvrtc", "elftools"):
        pytest.importorskip(module, reason="of the extra sedac[cuda]")
    gpu = find_gpu()
    if gpu is None:
        pytest.skip("this host has no NVIDIA GPU")
    if float(gpu.compute_capability) < 9:
        pytest.skip(f"the chain does not run on {gpu.name}")

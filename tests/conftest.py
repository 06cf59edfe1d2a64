"""Bundles that many tests share, built once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from build_cache import BuildCache
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from sedac_export import BuildRequest
from sedac_export.build import exporter
from sedac_export.tensorrt import portable_writer
from sedac_runtime import SedacModel

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
# threads of several workers that spin for the same cores hold each other up
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)

TinyBundle = tuple[PreTrainedModel, Path]


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
def cached_traces(build_cache: BuildCache) -> Iterator[None]:
    """Trace each model once: that is most of the time that a build takes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (exporter, portable_writer):
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

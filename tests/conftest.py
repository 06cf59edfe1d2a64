"""Bundles that many tests share, built once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from sedac_export import BuildRequest, build_bundle
from sedac_runtime import SedacModel

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
THREADS = 2

TinyBundle = tuple[PreTrainedModel, Path]


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyBundle]:
    """A random model of the named architecture, and its bundle."""
    built: dict[str, TinyBundle] = {}

    def get(name: str) -> TinyBundle:
        if name not in built:
            directory = tmp_path_factory.mktemp(name)
            model = save_tiny_model(name, directory / "model")
            build_bundle(BuildRequest(model=str(directory / "model"), output=directory / "bundle"))
            built[name] = (model, directory / "bundle")
        return built[name]

    return get


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's bundle, weights stored in fp16."""
    output = tmp_path_factory.mktemp("demo") / "bundle"
    build_bundle(BuildRequest(model=str(DEMO_MODEL), output=output, precision="fp16"))
    return output


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

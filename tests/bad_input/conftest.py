"""Commands, and bundles to damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from build_cache import BuildCache
from tiny_models import save_model_with_tokenizer

import sedac_export.cli
import sedac_runtime.cli
from bad_input.command import Command, call, rewrite_manifest
from sedac_export import BuildRequest

LONG_CACHE = 32768
SHORT_CACHE = 64


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Command:
    """sedac-export."""
    return lambda *arguments: call(sedac_export.cli.main, [str(a) for a in arguments], capfd)


@pytest.fixture
def runtime(capfd: pytest.CaptureFixture[str]) -> Command:
    """sedac-runtime."""
    return lambda *arguments: call(sedac_runtime.cli.main, [str(a) for a in arguments], capfd)


@pytest.fixture
def model(tiny_bundle: Callable[[str], tuple[object, Path]], tmp_path: Path) -> Path:
    """A model directory to damage; it has no tokenizer."""
    _, bundle = tiny_bundle("llama")
    return shutil.copytree(bundle.parent / "model", tmp_path / "model")


@pytest.fixture
def mute_bundle(tiny_bundle: Callable[[str], tuple[object, Path]]) -> Path:
    """A bundle without a tokenizer; not to be changed."""
    _, bundle = tiny_bundle("llama")
    return bundle


@pytest.fixture(scope="session")
def long_bundle(build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the demo's tokenizer and room for many tokens; not to be changed."""
    directory = tmp_path_factory.mktemp("long")
    save_model_with_tokenizer(directory / "model")
    output = directory / "bundle"
    return build_cache.bundle(
        BuildRequest(str(directory / "model"), output, max_cache_length=LONG_CACHE)
    )


@pytest.fixture
def bundle(long_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with a tokenizer and a short cache, to damage."""
    copy = shutil.copytree(long_bundle, tmp_path / "bundle")
    rewrite_manifest(copy, max_cache_length=SHORT_CACHE)
    return copy

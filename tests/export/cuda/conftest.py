"""Random tiny models, their bundles, and a stand-in for the chain that compiles at once."""

import ctypes
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build_cache import BuildCache
from tiny_models import save_tiny_model

from sedac_export import BuildRequest
from sedac_export.bundle.manifest import Precision
from sedac_export.cuda import chain_abi, compiler
from sedac_export.model.skeleton import Skeleton

TinySkeleton = Callable[[str], Skeleton]
HalfBundle = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def tiny_skeleton(tmp_path_factory: pytest.TempPathFactory) -> TinySkeleton:
    """The skeleton of an architecture's random model; nothing may be changed in it."""

    @functools.cache
    def get(name: str) -> Skeleton:
        directory = tmp_path_factory.mktemp("skeleton")
        save_tiny_model(name, directory)
        return Skeleton.load(directory)

    return get


@pytest.fixture
def half_bundle(build_cache: BuildCache, tmp_path: Path) -> HalfBundle:
    """A model and its bundle, by default of fp16, which the test may change."""

    def get(name: str, precision: Precision = "fp16", **settings: Any) -> tuple[Path, Path]:
        model = tmp_path / f"{name}-model"
        save_tiny_model(name, model)
        request = BuildRequest(str(model), tmp_path / name, precision=precision, **settings)
        return model, build_cache.bundle(request)

    return get


@pytest.fixture
def stand_in(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the stand-in in the chain's place."""
    for module in ("cuda.bindings.nvrtc", "elftools"):
        pytest.importorskip(module, reason="of the extra sedac[cuda]")
    kernels = tmp_path_factory.mktemp("stand_in") / "kernels"
    shutil.copytree(Path(__file__).with_name("stand_in"), kernels)
    mirrors = (chain_abi.Layer, chain_abi.Pass, chain_abi.Outcome)
    structs = ", ".join(map(str, [chain_abi.ABI, *map(ctypes.sizeof, mirrors)]))
    drafts = (chain_abi.DraftPass, chain_abi.DraftOutcome)
    batches = (chain_abi.BatchPass, chain_abi.BatchOutcome)
    macros = {
        "STRUCTS": structs,
        "DRAFT_STRUCTS": ", ".join(str(ctypes.sizeof(mirror)) for mirror in drafts),
        "BATCH_STRUCTS": ", ".join(str(ctypes.sizeof(mirror)) for mirror in batches),
    }
    lines = (f"#define {name} {value}\n" for name, value in macros.items())
    (kernels / "structs.cuh").write_text("".join(lines))
    monkeypatch.setattr(compiler, "KERNELS", kernels)

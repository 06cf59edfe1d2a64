"""Bundles with portable graphs, and with all their TensorRT-RTX plans, built once."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import onnx
import pytest
from build_cache import BuildCache
from conftest import DEMO_MODEL
from tiny_models import save_tiny_model

from sedac_export import BuildRequest
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.plan_entries import BuildOptions
from sedac_export.model.skeleton import Skeleton
from sedac_export.tensorrt.add import add_target
from sedac_export.tensorrt.build_plans import fingerprint
from sedac_export.tensorrt.portable_writer import add_portable_graphs

RTX = "tensorrt-rtx"
OPTIONS = BuildOptions(max_prefill_chunk=64)


def require_rtx() -> None:
    """Skip the test where TensorRT-RTX is not installed."""
    pytest.importorskip("tensorrt_rtx", reason="of the extra sedac[tensorrt-rtx]")


@pytest.fixture(scope="session")
def planned_demo(
    demo_bundle: Path, build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    require_rtx()

    def plan(directory: Path) -> None:
        bundle = shutil.copytree(demo_bundle, directory / "bundle")
        add_target(bundle, RTX, OPTIONS, str(DEMO_MODEL))

    planned = build_cache.made("planned", plan)
    return shutil.copytree(planned / "bundle", tmp_path_factory.mktemp("planned") / "bundle")


class PortableTiny(Protocol):
    def __call__(
        self, name: str, precision: str, layers_per_engine: int = 1
    ) -> tuple[Path, bundle.Manifest]: ...


@pytest.fixture(scope="session")
def portable_tiny(
    build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory
) -> PortableTiny:
    """The bundle of a random model, as in `tiny_bundle`, with portable graphs."""

    @functools.cache
    def get(name: str, precision: str, layers_per_engine: int = 1) -> tuple[Path, bundle.Manifest]:
        directory = tmp_path_factory.mktemp(f"{name}_{precision}")
        save_tiny_model(name, directory / "model")
        request = BuildRequest(
            model=str(directory / "model"),
            output=directory / "bundle",
            precision=precision,  # type: ignore[arg-type]
            layers_per_engine=layers_per_engine,
        )
        output = build_cache.bundle(request)
        manifest = bundle.read_manifest(output)
        skeleton = Skeleton.load(directory / "model")
        return output, add_portable_graphs(output, manifest, skeleton, lambda *_: None)

    return get


@pytest.fixture(scope="session")
def planned_tiny(
    portable_tiny: PortableTiny, build_cache: BuildCache, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Llama of four layers in fp16 with its plans."""
    require_rtx()

    def plan(directory: Path) -> None:
        bundle = shutil.copytree(portable_tiny("llama", "fp16")[0], directory / "bundle")
        add_target(bundle, RTX, OPTIONS)

    planned = build_cache.made("planned_tiny", plan)
    return shutil.copytree(planned / "bundle", tmp_path_factory.mktemp("planned") / "bundle")


@pytest.fixture
def own_tiny(planned_tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(planned_tiny, tmp_path / "bundle"))


@pytest.fixture(params=["planned_tiny", pytest.param("planned_demo", marks=pytest.mark.slow)])
def planned(request: pytest.FixtureRequest) -> Path:
    """A bundle of random weights, and the demo's with those that were trained."""
    directory: Path = request.getfixturevalue(request.param)
    return directory


def rewrite(directory: Path, graph: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph and the manifest with it, as if it had been exported and built so."""
    model = onnx.load(directory / graph, load_external_data=False)
    change(model)
    onnx.save(model, directory / graph)
    manifest = bundle.read_manifest(directory)
    manifest.files[graph] = bundle.file_entry(directory, graph)
    plans = manifest.plans[RTX]
    for plan in plans.plans:
        if plan.graph == graph:
            plan.fingerprint = fingerprint(directory, manifest, graph, plans.version, plans.options)
    bundle.write_manifest(directory, manifest)

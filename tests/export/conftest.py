"""Texts, and the demo bundle with probes trained on them."""

import importlib
import inspect
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from build_cache import BuildCache, load, save
from conftest import DEMO_MODEL

from sedac_export import BuildRequest
from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import Precision
from sedac_export.exits.replay.documents import Document, read_documents
from sedac_export.exits.training import train_probes as train_probes_module
from sedac_export.exits.training.head_torch import TorchHead
from sedac_export.exits.training.lens import Adapter, Lens, LensKind, LensRow, identity, judge
from sedac_export.exits.training.train_probes import Trained, train_probes

# never seen by the demo model; about a thousand tokens are kept of each
MODULES = ("argparse", "difflib", "tarfile", "zipfile", "typing", "inspect", "json.decoder")
EXITS, PROBES = (4, 8), (4, 6)

TrainedBundle = tuple[Path, Trained]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("texts")
    files = []
    for module in MODULES:
        text = inspect.getsource(importlib.import_module(module))
        files.append(directory / f"{module}.py")
        files[-1].write_text(text[4000:8000])
    return files


@pytest.fixture(scope="session")
def documents(demo_bundle: Path, texts: list[Path], quick: bool) -> list[Document]:
    length = 500 if quick else None
    whole = read_documents(Bundle.open(demo_bundle), texts)
    return [replace(document, tokens=document.tokens[:length]) for document in whole]


@dataclass(frozen=True)
class Training:
    """Trains probes in copies of the demo bundle, once for all tests."""

    documents: list[Document]
    build_cache: BuildCache
    directories: pytest.TempPathFactory
    quick: bool

    def __call__(
        self, name: str, untrained: Path, lenses: Sequence[LensKind] = ()
    ) -> TrainedBundle:
        """Train in a copy of `untrained`; the result can be changed."""

        def train(directory: Path) -> None:
            bundle = shutil.copytree(untrained, directory / "bundle")
            rows = train_probes(bundle, self.documents, EXITS, PROBES, lenses=lenses)
            save(directory, rows)

        trained = self.build_cache.made(f"{name}-{self.quick}", train)
        bundle = self.directories.mktemp(name) / "bundle"
        return shutil.copytree(trained / "bundle", bundle), load(trained)

    def quantized(self, precision: Precision) -> TrainedBundle:
        """Train in the demo model's bundle of `precision`."""
        output = self.directories.mktemp(precision) / "bundle"
        request = BuildRequest(model=str(DEMO_MODEL), output=output, precision=precision)
        return self(f"trained-{precision}", self.build_cache.bundle(request), lenses=["affine"])


@pytest.fixture(scope="session")
def training(
    documents: list[Document],
    build_cache: BuildCache,
    tmp_path_factory: pytest.TempPathFactory,
    quick: bool,
) -> Training:
    return Training(documents, build_cache, tmp_path_factory, quick)


@pytest.fixture(scope="session")
def trained_bundle(demo_bundle: Path, training: Training) -> TrainedBundle:
    return training("trained", demo_bundle)


@pytest.fixture(scope="session")
def lens_bundle(demo_bundle: Path, training: Training) -> TrainedBundle:
    """The same with lenses that change many tokens, which trained ones do too little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_probes_module, "train_lens", strong_lens)
        return training("lens", demo_bundle, lenses=["affine"])


@pytest.fixture(scope="session")
def adapter_bundle(demo_bundle: Path, training: Training) -> TrainedBundle:
    """The same with adapters, said to be better than affine lenses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_probes_module, "train_lens", strong_adapter)
        return training("adapter", demo_bundle, lenses=["affine", "mlp"])


@pytest.fixture(scope="session")
def int4_bundle(training: Training) -> TrainedBundle:
    """The demo model in int4, with probes and lenses that were trained on it."""
    return training.quantized("int4")


@pytest.fixture(scope="session")
def int8_bundle(training: Training) -> TrainedBundle:
    return training.quantized("int8")


def some_lens(size: int) -> torch.nn.Linear:
    """A lens far from the identity."""
    torch.manual_seed(0)
    lens = identity(size)
    with torch.no_grad():
        lens.weight += 0.3 * torch.randn(size, size) / size**0.5
        lens.bias += 0.03 * torch.randn(size)
    return lens


def some_adapter(size: int) -> Adapter:
    """An adapter far from the identity."""
    torch.manual_seed(0)
    lens = Adapter(size)
    with torch.no_grad():
        lens.norm.weight += 0.3 * torch.randn(size)
        lens.down.weight.copy_(2 * torch.randn(size, size) / size**0.5)
    return lens


def strong_lens(
    head: TorchHead, states: torch.Tensor, full: torch.Tensor, held_out: int, kind: LensKind
) -> tuple[Lens, LensRow]:
    """In place of `train_lens`: a lens that is kept, whatever it does."""
    make = some_lens if kind == "affine" else some_adapter
    lens = make(states.shape[-1])
    row = judge(head, lens, states[-held_out:], full[-held_out:])
    return lens, replace(row, kept=True)


def strong_adapter(
    head: TorchHead, states: torch.Tensor, full: torch.Tensor, held_out: int, kind: LensKind
) -> tuple[Lens, LensRow]:
    """The same, the affine one worse."""
    lens, row = strong_lens(head, states, full, held_out, kind)
    return lens, row if kind == "mlp" else replace(row, lens_kl=row.lens_kl + 100)

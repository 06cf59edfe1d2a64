"""Texts, and the demo bundle with probes trained on them."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from sedac_export.documents import Document, read_documents
from sedac_export.manifest import read_manifest
from sedac_export.training import Trained, train_probes

# never seen by the demo model; about a thousand tokens are kept of each
MODULES = ("argparse", "difflib", "tarfile", "zipfile", "typing", "inspect", "json/decoder")
EXITS, PROBES = (4, 8), (4, 6)

TrainedBundle = tuple[Path, Trained]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("texts")
    library = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for module in MODULES:
        text = (library / f"{module}.py").read_text(encoding="utf-8")
        files.append(directory / f"{Path(module).name}.py")
        files[-1].write_text(text[4000:8000])
    return files


@pytest.fixture(scope="session")
def documents(demo_bundle: Path, texts: list[Path]) -> list[Document]:
    return read_documents(demo_bundle, read_manifest(demo_bundle), texts)


@pytest.fixture(scope="session")
def trained_bundle(
    demo_bundle: Path, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> TrainedBundle:
    bundle = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("trained") / "bundle")
    return bundle, train_probes(bundle, documents, EXITS, PROBES)

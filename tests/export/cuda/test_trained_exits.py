"""Exits by what was trained for them: the GPU's kernel against ONNX Runtime on the CPU."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, THREADS, require_chain

from export.conftest import TrainedBundle
from sedac_export.bundle.edit import write_config
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.cuda.add_cuda import add_cuda
from sedac_export.exits.replay.documents import Document
from sedac_runtime import SedacModel


def probe_settings(medians: dict[int, float]) -> list[dict[str, Any]]:
    ones = dict.fromkeys(medians, 1.0)
    doubled = {depth: 2 * risk for depth, risk in medians.items()}
    targets = dict.fromkeys(medians, 0.6)
    cascade = {"policy": "cascade", "thresholds": doubled, "weights": ones, "targets": targets}
    return [{"policy": "probe", "thresholds": medians}, cascade]


def head_settings(depths: Iterable[int]) -> list[dict[str, Any]]:
    policies = {"margin": 0.5, "learned": 0.7}
    return [
        {"policy": policy, "thresholds": dict.fromkeys(depths, threshold)}
        for policy, threshold in policies.items()
    ]


@pytest.mark.gpu
def test_entropy_probes_stop_tokens_where_they_do_on_the_cpu(
    trained_bundle: TrainedBundle, documents: list[Document], tmp_path: Path
) -> None:
    directory, trained = trained_bundle
    # a risk next to its threshold may fall on either side in fp16
    compare(directory, probe_settings(trained.medians), documents, tmp_path, agreement=0.97)


@pytest.mark.gpu
def test_exit_heads_behind_lenses_stop_tokens_where_they_do_on_the_cpu(
    lens_bundle: TrainedBundle, documents: list[Document], tmp_path: Path
) -> None:
    directory, trained = lens_bundle
    # ONNX Runtime rounds exit heads to 8 bits
    compare(directory, head_settings(trained.learned), documents, tmp_path, agreement=0.93)


def compare(
    directory: Path,
    settings: list[dict[str, Any]],
    documents: list[Document],
    tmp_path: Path,
    agreement: float,
) -> None:
    """Follow a text by each of `settings` on both backends; so many tokens and depths are equal."""
    require_chain()
    bundle = shutil.copytree(directory, tmp_path / "bundle")
    add_cuda(bundle, str(DEMO_MODEL))
    text = documents[1].tokens[:400].tolist()
    for fields in settings:
        write_config(bundle, ExitConfig(**fields).to_json())
        ours, theirs = (
            list(zip(*model.follow(text), strict=True))
            for model in (
                SedacModel.from_pretrained(bundle, threads=THREADS, backend=backend)
                for backend in ("cuda", "onnxruntime")
            )
        )
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        assert same >= agreement * len(theirs), fields
        assert len({depth for _, depth in ours}) > 1

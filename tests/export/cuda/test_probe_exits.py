"""Exits by the entropy probe: the GPU's kernel against ONNX Runtime on the CPU."""

import shutil
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


def settings(medians: dict[int, float]) -> list[dict[str, Any]]:
    ones = dict.fromkeys(medians, 1.0)
    doubled = {depth: 2 * risk for depth, risk in medians.items()}
    targets = dict.fromkeys(medians, 0.6)
    cascade = {"policy": "cascade", "thresholds": doubled, "weights": ones, "targets": targets}
    return [{"policy": "probe", "thresholds": medians}, cascade]


@pytest.mark.gpu
def test_the_kernel_exits_where_onnxruntime_exits(
    trained_bundle: TrainedBundle, documents: list[Document], tmp_path: Path
) -> None:
    require_chain()
    directory, trained = trained_bundle
    bundle = shutil.copytree(directory, tmp_path / "bundle")
    add_cuda(bundle, str(DEMO_MODEL))
    text = documents[1].tokens[:400].tolist()
    for fields in settings(trained.medians):
        write_config(bundle, ExitConfig(**fields).to_json())
        ours, theirs = (
            list(zip(*model.follow(text), strict=True))
            for model in (
                SedacModel.from_pretrained(bundle, threads=THREADS, backend=backend)
                for backend in ("cuda", "onnxruntime")
            )
        )
        # a risk next to its threshold may fall on either side in fp16
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        assert same >= 0.97 * len(theirs), fields
        assert len({depth for _, depth in ours}) > 1

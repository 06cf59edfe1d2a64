"""The core's chain exits where a replay of the same bundle exits, under every policy."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import THREADS
from kernel_bits import skip_where_rows_differ
from typer.testing import CliRunner

from export.conftest import EXITS, TrainedBundle
from sedac_export.bundle import Bundle
from sedac_export.bundle.edit import write_config
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.exits.calibration.observe import Observations, observe
from sedac_export.exits.replay.documents import Document
from sedac_export.exits.replay.replay import Replay
from sedac_runtime import SedacModel
from sedac_runtime.cli import app


@pytest.fixture(scope="module")
def bundle(request: pytest.FixtureRequest) -> Path:
    skip_where_rows_differ(request.param.removesuffix("_bundle"))
    directory: Path
    directory, _ = request.getfixturevalue(request.param)
    return directory


@pytest.fixture(scope="module")
def beginnings(documents: list[Document], quick: bool) -> list[Document]:
    texts, length = (2, 100) if quick else (len(documents), 300)
    return [replace(document, tokens=document.tokens[:length]) for document in documents[:texts]]


@pytest.fixture(scope="module")
def seen(bundle: Path, beginnings: list[Document]) -> Observations:
    return observe(Replay(Bundle.open(bundle), THREADS), beginnings, lambda *_: None)


def medians(signal: dict[int, npt.NDArray[np.float32]]) -> dict[int, float]:
    """Thresholds at which about half of the tokens exit at each depth.

    They lie between two values: the chain and the replay may round one differently.
    """
    middles = {depth: np.sort(values)[len(values) // 2 :][:2] for depth, values in signal.items()}
    return {depth: float(middle.mean()) for depth, middle in middles.items()}


def settings(seen: Observations) -> Iterator[dict[str, Any]]:
    risk = medians(seen.risk)
    # the signals of probes rise with risk; those of exits with confidence
    yield {"policy": "stability", "tau": 0.99, "consecutive_k": 3}
    yield {"policy": "probe", "thresholds": risk}
    yield {"policy": "margin", "thresholds": medians(seen.margin)}
    yield {"policy": "learned", "thresholds": medians(seen.learned)}
    doubled = {depth: 2 * threshold for depth, threshold in risk.items()}
    for kind in ("hard", "soft"):
        yield {
            "policy": "cascade",
            "thresholds": doubled,
            "weights": dict.fromkeys(risk, 1.0),
            "targets": dict.fromkeys(risk, 0.6),
            "exit_kind": kind,
        }


@pytest.mark.parametrize(
    ("bundle", "kv_fill"),
    [
        ("trained_bundle", "propagate"),
        pytest.param("trained_bundle", "defer", marks=pytest.mark.slow),
        pytest.param("lens_bundle", "propagate", marks=pytest.mark.slow),
        ("lens_bundle", "defer"),
        ("adapter_bundle", "propagate"),
        ("int4_bundle", "propagate"),
        pytest.param("int4_bundle", "defer", marks=pytest.mark.slow),
        pytest.param("int8_bundle", "defer", marks=pytest.mark.slow),
    ],
    indirect=["bundle"],
)
def test_the_chain_exits_where_the_replay_exits(
    kv_fill: str,
    bundle: Path,
    beginnings: list[Document],
    seen: Observations,
) -> None:
    replay = Replay(Bundle.open(bundle), THREADS)
    for fields in settings(seen):
        config = ExitConfig(**fields, kv_fill=kv_fill)
        write_config(bundle, config.to_json())
        model = SedacModel.from_pretrained(bundle, threads=THREADS)
        exits = []
        for text in (beginning.tokens for beginning in beginnings):
            trace = replay.run(text, config.policy_settings(), kv_fill=kv_fill)
            tokens, depths = model.follow(text.tolist())
            assert depths == trace.exits[1:].tolist(), fields
            assert tokens == trace.tokens[1:].tolist(), fields
            exits += depths
        assert len(exits) == len(beginnings) * (len(text) - 1)
        # early and at full depth
        assert min(exits) < 12 and exits.count(12) > 0, fields


def test_the_environments_tau_is_not_taken_where_a_threshold_is(
    trained_bundle: TrainedBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(trained_bundle[0], tmp_path / "bundle")
    config = ExitConfig(policy="margin", thresholds=dict.fromkeys(EXITS, 0.9))
    write_config(bundle, config.to_json())
    monkeypatch.setenv("SEDAC_V7_TAU", "0.5")
    words = ["generate", "--engines", str(bundle), "--prompt", "def", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, [*words, "--mode", "exit", "--threshold", "0", "--json"])
    assert result.exit_code == 0, result.exception
    assert "margin" in json.loads(result.stdout)["exit_reasons"]

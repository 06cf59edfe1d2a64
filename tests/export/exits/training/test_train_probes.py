"""Probes in a bundle compute what was trained, and the bundle stays one that the runtime loads."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import THREADS
from safetensors import safe_open
from transformers import PreTrainedModel
from typer.testing import CliRunner

from export.conftest import EXITS, PROBES, TrainedBundle
from sedac_export.build.inspection import inspect_bundle
from sedac_export.bundle import Bundle
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.cli import app
from sedac_export.errors import SedacError
from sedac_export.exits.replay.documents import Document
from sedac_export.exits.replay.probes_file import risk_probes
from sedac_export.exits.replay.replay import Replay
from sedac_export.exits.replay.signals import Signals
from sedac_export.exits.training.collect import collect, open_collection
from sedac_export.exits.training.fit_probes import ranking, risk_target
from sedac_export.exits.training.train_probes import exit_depths, probe_depths, train_probes
from sedac_export.pytorch.accelerator import create_universal_accelerator
from sedac_runtime import SedacModel


@pytest.fixture(scope="module")
def replay(trained_bundle: TrainedBundle) -> Replay:
    bundle, _ = trained_bundle
    return Replay(Bundle.open(bundle), THREADS)


def test_the_runtime_loads_it_and_generates_as_before(
    trained_bundle: TrainedBundle, demo_model: SedacModel
) -> None:
    bundle, _ = trained_bundle
    manifest = Bundle.open(bundle).manifest
    assert [entry.depth for entry in manifest.engines.exits] == list(EXITS)
    with_risk = [e.first_layer + e.num_layers for e in manifest.engines.layers if e.risk]
    assert with_risk == list(PROBES)
    model = SedacModel.from_pretrained(bundle, threads=THREADS)
    prompt = "def main():\n"
    expected = demo_model.generate(prompt, mode="full", max_new_tokens=40)
    assert model.generate(prompt, mode="full", max_new_tokens=40).tokens == expected.tokens


def test_every_depth_has_a_row_of_its_figures(trained_bundle: TrainedBundle) -> None:
    _, trained = trained_bundle
    assert [row.depth for row in trained.rows] == sorted({*EXITS, *PROBES})
    for row in trained.rows:
        assert (row.agreement is not None) == (row.depth in EXITS)
        assert (row.risk_loss is not None) == (row.depth in PROBES)


def test_inspect_counts_the_weights_inside_exit_engines(trained_bundle: TrainedBundle) -> None:
    """They have no file beside them as layers do."""
    bundle, trained = trained_bundle
    shown = {row["name"]: row["bytes"] for row in inspect_bundle(bundle)["engines"]}
    width = Bundle.open(bundle).manifest.model.hidden_size
    for depth in EXITS:
        assert shown[f"exit_{depth:03}"] > len(trained.tokens) * width


def test_whoever_reads_the_bundle_reads_all_of_it(lens_bundle: TrainedBundle) -> None:
    bundle, _ = lens_bundle
    modes = {path.stat().st_mode for path in bundle.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_the_risk_output_is_the_probes(
    trained_bundle: TrainedBundle, replay: Replay, documents: list[Document]
) -> None:
    bundle, _ = trained_bundle
    probes = risk_probes(Bundle.open(bundle))
    assert sorted(probes) == list(PROBES)
    tokens = documents[0].tokens[:100]
    hidden: dict[int, np.ndarray] = {}
    risks: dict[int, np.ndarray] = {}

    def watch(x: np.ndarray, signals: Signals) -> None:
        hidden[signals.depth] = x.copy()
        if signals.risk is not None:
            risks[signals.depth] = signals.risk.copy()

    replay.run(tokens, watch=watch)
    assert sorted(risks) == list(PROBES)
    for depth, probe in probes.items():
        with torch.no_grad():
            expected = probe(torch.from_numpy(hidden[depth])).squeeze(-1).numpy()
        assert risks[depth] == pytest.approx(expected, abs=1e-5)
        assert expected.std() > 0.01


def test_exit_signals_are_the_pruned_heads(
    trained_bundle: TrainedBundle, replay: Replay, documents: list[Document]
) -> None:
    _, trained = trained_bundle
    hidden: dict[int, np.ndarray] = {}
    replay.run(
        documents[0].tokens[:200],
        watch=lambda x, signals: hidden.__setitem__(signals.depth, x.copy()),
    )
    x = hidden[8]
    signals = replay.exit_signals(8, x, np.ones((len(x), 3), dtype=np.float32))
    logits = torch.from_numpy(replay.plain_logits(x)[:, trained.tokens])
    probabilities = torch.softmax(logits, -1)
    top = probabilities.topk(2, -1).values
    entropy = -(probabilities * probabilities.log()).sum(-1)
    # the product is rounded to 8 bits
    assert signals[:, 0] == pytest.approx((top[:, 0] - top[:, 1]).numpy(), abs=0.05)
    assert signals[:, 1] == pytest.approx(entropy.numpy(), abs=0.1)
    assert ((signals[:, 2] > 0) & (signals[:, 2] < 1)).all()
    assert signals[:, 2].std() > 0.05


def policies(medians: dict[int, float]) -> list[ExitConfig]:
    ones = dict.fromkeys(medians, 1.0)
    cascade = {"thresholds": {d: 1.5 * m for d, m in medians.items()}, "weights": ones}
    targets = dict.fromkeys(medians, 0.4)
    return [
        ExitConfig(tau=0.98, consecutive_k=2),
        ExitConfig(policy="probe", thresholds=medians),
        ExitConfig(policy="cascade", targets=targets, **cascade),
        ExitConfig(policy="cascade", targets=targets, exit_kind="soft", **cascade),
        ExitConfig(policy="margin", thresholds=dict.fromkeys(EXITS, 0.7)),
        ExitConfig(policy="learned", thresholds=dict.fromkeys(EXITS, 0.8)),
        ExitConfig(policy="learned", thresholds=dict.fromkeys(EXITS, 0.8), kv_fill="defer"),
        ExitConfig(tau=0.98, consecutive_k=2, kv_fill="defer"),
    ]


@pytest.mark.parametrize("number", range(8))
def test_the_chain_exits_where_the_accelerator_exits(
    number: int,
    trained_bundle: TrainedBundle,
    replay: Replay,
    documents: list[Document],
    demo_reference: PreTrainedModel,
) -> None:
    bundle, trained = trained_bundle
    config = policies(trained.medians)[number]
    tokens = documents[1].tokens[:800]
    trace = replay.run(tokens, config.policy_settings(), kv_fill=config.kv_fill)
    exits = create_universal_accelerator(demo_reference, config=config, bundle=bundle)
    with torch.no_grad(), exits:
        logits = demo_reference(torch.from_numpy(tokens)[None]).logits[0]
    same = (trace.depths == exits.stats().last_depths) & (trace.tokens == logits.argmax(-1).numpy())
    # a signal next to its threshold may fall on either side, and 8 bits round more than 32
    assert same.mean() > 0.99
    assert len(set(trace.depths)) > 1


def test_training_again_replaces(
    trained_bundle: TrainedBundle, documents: list[Document], tmp_path: Path
) -> None:
    bundle = shutil.copytree(trained_bundle[0], tmp_path / "bundle")
    train_probes(bundle, documents, [6], [8])
    manifest = Bundle.open(bundle).manifest
    assert [entry.depth for entry in manifest.engines.exits] == [6]
    assert [e.first_layer for e in manifest.engines.layers if e.risk] == [7]
    assert not (bundle / "onnx" / "exit_004.onnx").exists()
    with safe_open(bundle / "probes.safetensors", framework="np") as handle:
        assert handle.metadata()["model"] == manifest.model.name
        assert not any(name.startswith(("risk.4", "learned.4")) for name in handle.keys())  # noqa: SIM118


def test_collecting_goes_on_where_it_was_interrupted(
    demo_bundle: Path, documents: list[Document], tmp_path: Path
) -> None:
    replay = Replay(Bundle.open(demo_bundle), THREADS)
    manifest = replay.manifest
    whole = collect(replay, documents[:3], tmp_path / "whole", [6])
    collect(replay, documents[:1], tmp_path / "parts", [6])
    # an interrupted run leaves bytes that no document owns
    with (tmp_path / "parts" / "hidden_006").open("ab") as file:
        file.write(b"half a token")
    collect(replay, documents[:3], tmp_path / "parts", [6])
    parts = open_collection(tmp_path / "parts", manifest, [6])
    assert parts.tokens == whole.tokens == sum(len(d.tokens) for d in documents[:3])
    for name in whole.fields:
        assert np.array_equal(parts.read(name), whole.read(name)), name


def test_a_collection_is_of_all_layers_weights(
    demo_bundle: Path, lens_bundle: TrainedBundle, documents: list[Document], tmp_path: Path
) -> None:
    collect(Replay(Bundle.open(demo_bundle), THREADS), documents[:1], tmp_path / "states", [6])
    # lenses and probes, those in the layers too, do not change what was collected
    edited = Bundle.open(lens_bundle[0]).manifest
    assert open_collection(tmp_path / "states", edited, [6]).documents
    for name in ("embed", "layer_000", f"layer_{edited.model.num_layers - 1:03}", "head"):
        other = edited.model_copy(deep=True)
        other.files[f"onnx/{name}.data"].sha256 = "0" * 64
        with pytest.raises(SedacError, match="another model"):
            open_collection(tmp_path / "states", other, [6])


def test_a_collection_serves_the_training_of_any_of_its_depths(
    demo_bundle: Path, texts: list[Path], tmp_path: Path
) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    collected, data = tmp_path / "states", tmp_path / "text.py"
    data.write_text(texts[0].read_text()[:200])
    words = ["collect", str(demo_bundle), "--data", str(data), "--output", str(collected)]
    assert CliRunner().invoke(app, words).exit_code == 0
    # what train-probes takes by default
    depths = sorted({*exit_depths(manifest, None), *probe_depths(manifest, None)})
    assert open_collection(collected, manifest, depths).depths == depths
    assert open_collection(collected, manifest, depths[1:2]).depths == depths
    with pytest.raises(SedacError, match="not all of"):
        open_collection(collected, manifest, [*depths, 11])


def test_a_collection_keeps_its_limit(
    demo_bundle: Path, documents: list[Document], tmp_path: Path
) -> None:
    replay = Replay(Bundle.open(demo_bundle), THREADS)
    manifest = replay.manifest
    first = open_collection(tmp_path / "limited", manifest, [6])
    limit = first.bytes_per_token * len(documents[0].tokens)
    limited = collect(replay, documents, tmp_path / "limited", [6], max_bytes=limit)
    assert len(limited.documents) == 1
    assert sum(f.stat().st_size for f in (tmp_path / "limited").glob("*_*")) <= limit


def test_risk_targets_are_clamped_logarithms() -> None:
    target = risk_target(torch.arange(101, dtype=torch.float32))
    assert float(target.min()) == pytest.approx(np.log1p(1))
    assert float(target.max()) == pytest.approx(np.log1p(99))


def test_ranking_is_the_area_under_the_curve() -> None:
    scores, right = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert ranking(scores, right) == pytest.approx(0.75)
    # NaN would be no JSON
    assert ranking(scores, torch.ones(4, dtype=torch.bool)) is None

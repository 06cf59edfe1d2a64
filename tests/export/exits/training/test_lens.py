"""A lens is what was trained, wherever exits are read, and goes when training leaves it out."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import THREADS, TinyBundle
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES

from export.conftest import EXITS, TrainedBundle, some_adapter, some_lens
from sedac_export.bundle import Bundle
from sedac_export.bundle.manifest import read_manifest
from sedac_export.bundle.sessions import Engine, load_engine
from sedac_export.errors import SedacError
from sedac_export.exits.calibration.observe import observe
from sedac_export.exits.replay.documents import Document
from sedac_export.exits.replay.probes import LearnedProbe
from sedac_export.exits.replay.replay import Replay
from sedac_export.exits.replay.signals import Signals
from sedac_export.exits.training.exit_graphs import exit_engine, lens_engine
from sedac_export.exits.training.fit_probes import Fit
from sedac_export.exits.training.head_graph import HeadGraph
from sedac_export.exits.training.head_torch import OPERATORS, TorchHead
from sedac_export.exits.training.lens import Adapter, Lens, LensKind, divergence, train_lens
from sedac_export.exits.training.train_probes import train_probes

Tiny = Callable[[str], TinyBundle]


def heads(bundle: Path) -> tuple[HeadGraph, TorchHead, Engine]:
    opened = Bundle.open(bundle)
    head = HeadGraph.load(opened)
    engine = load_engine(opened, opened.manifest.engines.head, THREADS)
    return head, TorchHead(head, bundle / "onnx"), engine


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_in_torch_is_the_head_engine(name: str, tiny_bundle: Tiny) -> None:
    _, bundle = tiny_bundle(name)
    _, head, engine = heads(bundle)
    x = torch.randn(5, read_manifest(bundle).model.hidden_size, requires_grad=True)
    logits = head(x)
    expected = engine.run({"x": x.detach()[None].numpy()})["logits"][0]
    assert logits.detach().numpy() == pytest.approx(expected, abs=1e-5)
    logits.square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("make", [some_lens, some_adapter])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engines_with_a_lens_read_what_it_gives(
    name: str, make: Callable[[int], Lens], tiny_bundle: Tiny
) -> None:
    _, bundle = tiny_bundle(name)
    head, _, _ = heads(bundle)
    hidden = read_manifest(bundle).model.hidden_size
    lens, probe = make(hidden), LearnedProbe(head.width)
    x = torch.randn(9, hidden)
    seen = Engine(lens_engine(head, lens).SerializeToString(), THREADS).run({"x": x[None].numpy()})
    with torch.no_grad():
        assert seen["y"][0] == pytest.approx(lens(x).numpy(), abs=1e-5)
    tokens, stability = np.arange(0, 256, 2), np.ones((1, 9, 3), np.float32)
    plain, through = (
        Engine(exit_engine(head, bundle / "onnx", tokens, probe, given).SerializeToString())
        for given in (None, lens)
    )
    expected = plain.run({"x": seen["y"], "stability": stability})["signals"]
    without = plain.run({"x": x[None].numpy(), "stability": stability})["signals"]
    signals = through.run({"x": x[None].numpy(), "stability": stability})["signals"]
    # activations that differ in the last digit may round to other 8 bits
    assert signals == pytest.approx(expected, abs=5e-3)
    assert np.abs(signals - without).max() > 2e-2


def test_divergence_is_kullback_and_leiblers() -> None:
    wanted, given = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert float(divergence(wanted.log() + 3, given.log())) == pytest.approx(expected, rel=1e-5)


def test_a_lens_undoes_an_affine_map(tiny_bundle: Tiny) -> None:
    _, bundle = tiny_bundle("llama")
    _, head, _ = heads(bundle)
    torch.manual_seed(0)
    full = torch.randn(3000, read_manifest(bundle).model.hidden_size)
    with torch.no_grad():
        states = some_lens(full.shape[-1])(full)
    lens, row = train_lens(
        head, states, full, 500, fit=Fit(epochs=4, rate=1e-2, batch=128, decay=0)
    )
    assert lens is not None
    assert row.kept
    assert row.lens_kl < 0.1 * row.kl
    assert row.lens_agreement > row.agreement


def test_an_adapter_starts_as_the_identity_and_learns_what_is_not_affine(tiny_bundle: Tiny) -> None:
    _, bundle = tiny_bundle("llama")
    _, head, _ = heads(bundle)
    torch.manual_seed(0)
    hidden = read_manifest(bundle).model.hidden_size
    states = torch.randn(3000, hidden)
    assert torch.equal(Adapter(hidden)(states), states)
    with torch.no_grad():
        full = some_adapter(hidden)(states)
    fit = Fit(epochs=12, rate=1e-2, batch=128, decay=0)
    rows = {kind: train_lens(head, states, full, 500, kind, fit)[1] for kind in ("affine", "mlp")}
    assert rows["mlp"].kept
    assert rows["mlp"].lens_kl < 0.5 * rows["affine"].lens_kl
    assert rows["mlp"].bytes == 4 * (3 * hidden * hidden + hidden)


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_a_lens_that_does_not_help_is_not_kept(kind: LensKind, tiny_bundle: Tiny) -> None:
    _, bundle = tiny_bundle("llama")
    _, head, _ = heads(bundle)
    full = torch.randn(1500, read_manifest(bundle).model.hidden_size)
    lens, row = train_lens(head, full, full, 500, kind)
    assert lens is None
    assert not row.kept
    assert (row.kl, row.agreement) == (pytest.approx(0, abs=1e-6), 1.0)


def test_a_bundle_holds_the_lenses_that_were_trained(lens_bundle: TrainedBundle) -> None:
    bundle, trained = lens_bundle
    manifest = Bundle.open(bundle).manifest
    with_lens = {entry.depth: entry.lens for entry in manifest.engines.exits}
    assert with_lens == {depth: f"onnx/lens_{depth:03}.onnx" for depth in EXITS}
    assert sorted(trained.lenses) == list(EXITS)
    stored = load_file(bundle / "lens.safetensors")
    assert "lens.safetensors" in manifest.files
    assert len(stored) == 2 * len(trained.lenses)
    for depth, lens in trained.lenses.items():
        assert torch.equal(stored[f"{depth}.weight"], lens.weight)
        assert torch.equal(stored[f"{depth}.bias"], lens.bias)
    for row in (row for row in trained.rows if row.depth in EXITS):
        # the probe was told of the tokens that the lens gives
        assert row.lens is not None and row.agreement is not None
        assert row.agreement == pytest.approx(row.lens.lens_agreement, abs=2e-3)
        assert abs(row.agreement - row.lens.agreement) > 0.02


def test_of_two_kinds_of_lens_a_depth_gets_the_better(
    adapter_bundle: TrainedBundle, documents: list[Document]
) -> None:
    bundle, trained = adapter_bundle
    stored = load_file(bundle / "lens.safetensors")
    for row in (row for row in trained.rows if row.depth in EXITS):
        assert row.lens is not None and row.adapter is not None
        # `worse_lens` is the affine one
        assert (row.lens.kept, row.adapter.kept) == (False, True)
        lens = trained.lenses[row.depth]
        assert torch.equal(stored[f"{row.depth}.down.weight"], lens.state_dict()["down.weight"])
        assert f"{row.depth}.weight" not in stored
        assert row.agreement == pytest.approx(row.adapter.lens_agreement, abs=2e-3)


@pytest.mark.parametrize("kind", ["lens", "adapter"])
def test_exits_are_observed_through_the_lens(
    kind: str, request: pytest.FixtureRequest, documents: list[Document]
) -> None:
    bundle, trained = request.getfixturevalue(f"{kind}_bundle")
    replay = Replay(Bundle.open(bundle), THREADS)
    texts = [Document(d.name, d.tokens[:500], d.sha256) for d in documents[:2]]
    seen = observe(replay, texts)
    hidden: dict[int, list[np.ndarray]] = {depth: [] for depth in EXITS}

    def watch(x: np.ndarray, signals: Signals) -> None:
        if signals.depth in hidden:
            hidden[signals.depth].append(x.copy())

    for text in texts:
        replay.run(text.tokens, watch=watch)
    first = [0, 500]
    assert sorted(trained.lenses) == list(EXITS)
    for depth, lens in trained.lenses.items():
        x = np.concatenate(hidden[depth])
        with torch.no_grad():
            through = replay.plain_logits(lens(torch.from_numpy(x)).numpy()).argmax(-1)
        assert (np.delete(through, first) == seen.tokens[depth]).mean() > 0.999
        plain = replay.plain_logits(x).argmax(-1)
        assert (np.delete(plain, first) == seen.tokens[depth]).mean() < 0.98


def test_training_without_lenses_removes_them(
    lens_bundle: TrainedBundle, documents: list[Document], tmp_path: Path
) -> None:
    bundle = shutil.copytree(lens_bundle[0], tmp_path / "bundle")
    train_probes(bundle, documents, EXITS, [])
    manifest = Bundle.open(bundle).manifest
    assert all(entry.lens is None for entry in manifest.engines.exits)
    assert "lens.safetensors" not in manifest.files
    assert not (bundle / "lens.safetensors").exists()
    assert not list(bundle.glob("onnx/lens_*"))


def test_a_head_that_torch_cannot_run_is_named(
    tiny_bundle: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle = tiny_bundle("llama")
    monkeypatch.delitem(OPERATORS, "RMSNormalization")
    with pytest.raises(SedacError, match=r"operator RMSNormalization.*without --lens"):
        heads(bundle)

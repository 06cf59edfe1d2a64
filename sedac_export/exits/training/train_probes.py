"""Fit probes to a bundle and make them part of it: what `sedac-export train-probes` and
`train-exits` do.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from sedac_export.bundle import Bundle
from sedac_export.bundle.edit import edited_bundle
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.bundle.manifest import (
    EXIT_CONFIG,
    ExitEngineEntry,
    LayerEngineEntry,
    Manifest,
    list_files,
    write_manifest,
)
from sedac_export.bundle.sessions import Engine
from sedac_export.console import StageProgress
from sedac_export.errors import SedacError
from sedac_export.exits.replay.documents import Document
from sedac_export.exits.replay.probes import LearnedProbe, LREProbe
from sedac_export.exits.replay.probes_file import write_lenses, write_probes
from sedac_export.exits.replay.replay import Replay, chunks, early_depths
from sedac_export.exits.training.collect import DEFAULT_BYTES, Collection, collect, left_out
from sedac_export.exits.training.exit_graphs import (
    NORMED,
    SCALARS_NAME,
    exit_engine,
    features_model,
    lens_engine,
    with_risk,
    without_risk,
)
from sedac_export.exits.training.fit_probes import (
    one_thread,
    ranking,
    risk_target,
    train_learned,
    train_risk,
)
from sedac_export.exits.training.head_graph import HeadGraph
from sedac_export.exits.training.head_torch import TorchHead
from sedac_export.exits.training.lens import (
    Lens,
    LensKind,
    LensRow,
    tokens_through,
    train_lens,
)
from sedac_export.graph.stamp import save_engine

# the most exit engines where no depths are asked for
MOST_EXITS = 8
PROBE_SHARES = (1 / 6, 1 / 3, 1 / 2)
HELD_OUT = 0.15
MIN_TOKENS = 2000
# the pruned head may read so much of an fp32 layer's bytes; with the rest an exit engine stays
# below a fifth of its time
HEAD_SHARE = 0.16


@dataclass
class ProbeRow:
    """What one depth's probes reach on held-out documents.

    agreement: share of exit tokens that are full depth's. margin and learned: area under the ROC
    curve of telling those, None where all agree or none do. All three are None where the depth has
    no exit engine. risk_loss: Huber loss of the V6 probe, None where there is none. lens and
    adapter: what an affine lens and an MLP change, None where not asked for. The better is kept if
    it helps, and the other figures are with it.
    """

    depth: int
    agreement: float | None = None
    margin: float | None = None
    learned: float | None = None
    risk_loss: float | None = None
    lens: LensRow | None = None
    adapter: LensRow | None = None


@dataclass
class Trained:
    """The trained parts by depth, the held-out rows, and how many documents a limit left out."""

    tokens: npt.NDArray[np.int64]
    learned: dict[int, LearnedProbe] = field(default_factory=dict)
    risks: dict[int, LREProbe] = field(default_factory=dict)
    medians: dict[int, float] = field(default_factory=dict)
    lenses: dict[int, Lens] = field(default_factory=dict)
    rows: list[ProbeRow] = field(default_factory=list)
    left_out: int = 0


def exit_depths(
    manifest: Manifest, asked: Sequence[int] | None, option: str = "--exit-layers"
) -> list[int]:
    """The depths that get exit engines: those asked for, else up to MOST_EXITS spread evenly."""
    layers, early = manifest.model.num_layers, early_depths(manifest)
    if asked is not None:
        return _allowed(asked, early, option)
    if len(early) <= MOST_EXITS:
        return early
    wanted = (layers * part / MOST_EXITS for part in range(1, MOST_EXITS))
    return sorted({_nearest(early, depth) for depth in wanted})


def probe_depths(manifest: Manifest, asked: Sequence[int] | None) -> list[int]:
    """The depths that get V6 probes: by default those nearest 1/6, 1/3 and 1/2 of the layers."""
    layers, early = manifest.model.num_layers, early_depths(manifest)
    if asked is not None:
        return _allowed(asked, early, "--probe-layers")
    return sorted({_nearest(early, share * layers) for share in PROBE_SHARES}) if early else []


def train_probes(
    directory: Path,
    documents: Sequence[Document],
    exits: Sequence[int],
    probes: Sequence[int],
    collection: Path | None = None,
    max_bytes: int = DEFAULT_BYTES,
    progress: StageProgress = lambda *_: None,
    lenses: Sequence[LensKind] = (),
) -> Trained:
    """Collect `documents`, fit the probes, and write them into the bundle at `directory`.

    collection: where the collected states are kept; None takes a temporary directory. lenses: kinds
    of lens to fit too; a depth gets the best, where it helps, and its probes are fitted to what is
    seen through it. The exit configuration goes back to its defaults: thresholds and a certificate
    are of the old probes.

    Raises SedacError when there is too little data to hold some out.
    """
    bundle = Bundle.open(directory)
    _require_enough([len(document.tokens) for document in documents])
    depths = sorted({*exits, *probes})
    head = HeadGraph.load(bundle)
    torch_head = TorchHead(head, directory / "onnx") if lenses else None
    with tempfile.TemporaryDirectory() as temporary:
        collected = collect(
            Replay(bundle),
            documents,
            collection or Path(temporary) / "collection",
            depths,
            max_bytes,
            lambda done, of: progress("collect", done, of),
        )
        left = left_out(collected, documents)
        _require_enough([document["tokens"] for document in collected.documents], left)
        trainer = _Trainer(bundle, head, torch_head, collected)
        for number, depth in enumerate(depths):
            progress("train", number, len(depths))
            if depth in exits:
                trainer.fit_lens(depth, lenses)
            with one_thread():
                trainer.fit(depth, depth in exits, depth in probes)
        progress("train", len(depths), len(depths))
    _write(bundle, head, trainer.trained)
    return replace(trainer.trained, left_out=left)


def _require_enough(sizes: Sequence[int], left: int = 0) -> None:
    """Raise SedacError when documents of `sizes` are too little; a limit left out `left` more."""
    if sum(sizes) < MIN_TOKENS or len(sizes) < 2:
        limit = f", or raise --max-bytes, which left out {left}" if left else ""
        raise SedacError(
            f"documents: {len(sizes)}, tokens: {sum(sizes)}, which is too little to train on; give"
            f" at least {MIN_TOKENS} tokens in 2 documents{limit}"
        )


class _Trainer:
    def __init__(
        self,
        bundle: Bundle,
        head: HeadGraph,
        torch_head: TorchHead | None,
        data: Collection,
    ) -> None:
        manifest = bundle.manifest
        self.directory, self.data = bundle.directory, data
        self.head, self.torch_head = head, torch_head
        self.indices, self.held_out = _split(data)
        self.layers = manifest.model.num_layers
        self.lens_rows: dict[int, dict[LensKind, LensRow]] = {}
        full = data.read("full_token")[self.indices]
        count = head_rows(bundle, self.head)
        self.full = torch.from_numpy(full.astype(np.int64))
        self.target = risk_target(torch.from_numpy(data.read("full_entropy")[self.indices]))
        self.trained = Trained(frequent_tokens(full[: -self.held_out], manifest, count))

    def fit_lens(self, depth: int, kinds: Sequence[LensKind]) -> None:
        """Fit lenses at `depth`, before `fit`. Unlike probes they gain from several threads."""
        self.lens_rows[depth] = rows = {}
        if self.torch_head is None:
            return
        states, full = (
            torch.from_numpy(self.data.read(f"hidden_{d:03}")[self.indices])
            for d in (depth, self.layers)
        )
        best = math.inf
        for kind in kinds:
            lens, row = train_lens(self.torch_head, states, full, self.held_out, kind)
            if lens is not None and row.lens_kl < best:
                best, self.trained.lenses[depth] = row.lens_kl, lens
            rows[kind] = row
        for kind, row in rows.items():
            rows[kind] = replace(row, kept=row.kept and row.lens_kl == best)

    def fit(self, depth: int, with_exit: bool, with_risk: bool) -> None:
        hidden = self.data.read(f"hidden_{depth:03}")[self.indices]
        row = self._fit_exit(depth, hidden) if with_exit else ProbeRow(depth)
        self.trained.rows.append(row)
        if with_risk:
            states = torch.from_numpy(hidden)
            probe, loss = train_risk(states, self.target, self.held_out)
            self.trained.risks[depth] = probe
            with torch.no_grad():
                seen = probe(states[-self.held_out :].float())
            self.trained.medians[depth] = float(seen.median())
            row.risk_loss = loss

    def _fit_exit(self, depth: int, hidden: npt.NDArray[np.float16]) -> ProbeRow:
        normed, scalars = self._features(depth, hidden)
        agrees = self._exit_tokens(depth, hidden) == self.full
        probe, _ = train_learned(normed, scalars, agrees, self.held_out)
        self.trained.learned[depth] = probe
        held = slice(len(agrees) - self.held_out, None)
        with torch.no_grad():
            scores = probe(normed[held].float(), scalars[held]).squeeze(-1)
        lenses = self.lens_rows.get(depth, {})
        return ProbeRow(
            depth,
            float(agrees[held].float().mean()),
            ranking(scalars[held, 2] - scalars[held, 3], agrees[held]),
            ranking(scores, agrees[held]),
            lens=lenses.get("affine"),
            adapter=lenses.get("mlp"),
        )

    def _exit_tokens(self, depth: int, hidden: npt.NDArray[np.float16]) -> Tensor:
        """The tokens of exits at `depth`, int64: the collected ones are without a lens."""
        lens = self.trained.lenses.get(depth)
        if lens is not None and self.torch_head is not None:
            return tokens_through(self.torch_head, lens, torch.from_numpy(hidden))
        collected = self.data.read(f"exit_token_{depth:03}")[self.indices]
        return torch.from_numpy(collected.astype(np.int64))

    def _features(self, depth: int, hidden: npt.NDArray[np.float16]) -> tuple[Tensor, Tensor]:
        """The probe's inputs for all rows, of the exit engine's own graph: fp16 and fp32."""
        untrained = LearnedProbe(self.head.width)
        onnx_path = self.directory / "onnx"
        lens = self.trained.lenses.get(depth)
        engine = exit_engine(self.head, onnx_path, self.trained.tokens, untrained, lens)
        features = Engine(features_model(engine, self.head).SerializeToString())
        last = self.data.read("stability")[:, max(0, depth - 3) : depth][self.indices]
        last = np.pad(last, ((0, 0), (3 - last.shape[1], 0)))
        normed, scalars = [], []
        for chunk in chunks(len(hidden), 1024):
            outputs = features.run(
                {"x": hidden[chunk][None].astype(np.float32), "stability": last[chunk][None]}
            )
            normed.append(torch.from_numpy(outputs[NORMED][0]).half())
            scalars.append(torch.from_numpy(outputs[SCALARS_NAME][0]))
        return torch.cat(normed), torch.cat(scalars)


def head_rows(bundle: Bundle, head: HeadGraph) -> int:
    """Rows of the pruned head: as many as HEAD_SHARE of a layer's bytes, a power of two.

    On the CPU one token's time goes with the bytes that are read. Rows are stored in 8 bits, and
    bytes are those of fp32 whatever the precision: with half as many rows an exit engine of
    py-exit-24l in int4 takes 0.34 of a layer's time instead of 0.42, but its margin tells less
    (area under the ROC curve after 12 layers 0.752 instead of 0.765).
    """
    layer = bundle.graph(bundle.manifest.engines.layers[0].file)
    numbers = sum(math.prod(i.dims) for i in layer.graph.initializer)
    rows = max(1.0, HEAD_SHARE * 4 * numbers / head.width)
    return int(min(head.vocabulary, max(64, 2 ** int(math.log2(rows)))))


def frequent_tokens(
    tokens: npt.NDArray[np.int32], manifest: Manifest, count: int
) -> npt.NDArray[np.int64]:
    """The `count` most frequent of `tokens`, ascending; int64."""
    counts = np.bincount(tokens, minlength=manifest.model.vocab_size)
    return np.sort(np.argsort(-counts, kind="stable")[:count]).astype(np.int64)


def _split(data: Collection) -> tuple[npt.NDArray[np.int64], int]:
    """Rows to use, held-out documents last, and how many of them are held out.

    A window's first token is left out: it always runs at full depth.
    """
    generator = np.random.default_rng(0)
    sizes = np.array([document["tokens"] for document in data.documents])
    order = generator.permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    held = order[before < HELD_OUT * sizes.sum()][: len(sizes) - 1]
    documents = data.document_ids()
    usable = np.asarray(data.read("first")) == 0
    training = np.flatnonzero(usable & ~np.isin(documents, held))
    testing = np.flatnonzero(usable & np.isin(documents, held))
    return np.concatenate([training, testing]), len(testing)


def _write(bundle: Bundle, head: HeadGraph, trained: Trained) -> None:
    """Put the probes into the bundle: all of them or none."""
    manifest = bundle.manifest
    with edited_bundle(bundle) as staging:
        for old in [*staging.glob("onnx/exit_*.onnx"), *staging.glob("onnx/lens_*.onnx")]:
            old.unlink()
        exits = [_with_exit(staging, head, depth, trained) for depth in sorted(trained.learned)]
        layers = [_with_risk(staging, entry, trained) for entry in manifest.engines.layers]
        write_probes(staging, manifest, _tensors(trained), trained.medians)
        write_lenses(staging, manifest, trained.lenses)
        config = ExitConfig.for_layers(manifest.model.num_layers)
        (staging / EXIT_CONFIG).write_text(config.to_json())
        engines = manifest.engines.model_copy(update={"exits": exits, "layers": layers})
        whole = manifest.model_copy(update={"engines": engines, "files": list_files(staging)})
        write_manifest(staging, whole)


def _with_exit(staging: Path, head: HeadGraph, depth: int, trained: Trained) -> ExitEngineEntry:
    """Write the exit engine at `depth`, and its lens where it has one."""
    entry = ExitEngineEntry(depth=depth, file=f"onnx/exit_{depth:03}.onnx")
    probe, lens = trained.learned[depth], trained.lenses.get(depth)
    save_engine(
        exit_engine(head, staging / "onnx", trained.tokens, probe, lens), staging / entry.file
    )
    if lens is not None:
        entry.lens = f"onnx/lens_{depth:03}.onnx"
        save_engine(lens_engine(head, lens), staging / entry.lens)
    return entry


def _with_risk(staging: Path, entry: LayerEngineEntry, trained: Trained) -> LayerEngineEntry:
    """Give the layer engine its probe, or take an earlier one away."""
    probe = trained.risks.get(entry.first_layer + entry.num_layers)
    if probe is not None or entry.risk:
        layer = onnx.load(staging / entry.file, load_external_data=False)
        changed = without_risk(layer) if probe is None else with_risk(layer, probe)
        save_engine(changed, staging / entry.file)
    return entry.model_copy(update={"risk": probe is not None})


def _tensors(trained: Trained) -> dict[str, Tensor]:
    """What probes.safetensors holds."""
    tensors = {"frequent_tokens": torch.from_numpy(trained.tokens)}
    for kind, probes in (("risk", trained.risks), ("learned", trained.learned)):
        for depth, probe in probes.items():
            state: dict[str, Any] = probe.state_dict()
            tensors |= {f"{kind}.{depth}.{k}": v.contiguous() for k, v in state.items()}
    return tensors


def _nearest(depths: Sequence[int], wanted: float) -> int:
    return min(depths, key=lambda depth: (abs(depth - wanted), depth))


def _allowed(asked: Sequence[int], early: Sequence[int], option: str) -> list[int]:
    for depth in asked:
        if depth not in early:
            raise SedacError(
                f"{option} {depth} is not a depth at which this bundle's tokens exit early:"
                f" {', '.join(map(str, early))}"
            )
    return sorted(set(asked))

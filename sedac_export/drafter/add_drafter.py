"""Make a trained drafter part of a bundle: its file, and its engines for ONNX Runtime."""

from pathlib import Path

import onnx
import torch

from sedac_export.bundle import Bundle
from sedac_export.bundle.edit import edited_bundle
from sedac_export.bundle.manifest import DrafterEntry, list_files, write_manifest
from sedac_export.drafter.draft_model import DrafterShape
from sedac_export.drafter.drafter_file import DRAFTER, DrafterFile
from sedac_export.drafter.drafter_graph import draft_graph, state_graph
from sedac_export.errors import SedacError
from sedac_export.exits.training.head_graph import HeadGraph
from sedac_export.graph.stamp import save_engine

STATE_ENGINE, DRAFT_ENGINE = "onnx/draft_state.onnx", "onnx/draft.onnx"


def add_drafter(directory: Path, file: Path) -> DrafterEntry:
    """Put the drafter in `file` into the bundle in `directory`, in place of one that it has.

    Exits and their certificate stay: a drafter changes no token.

    Raises SedacError when it is of another model, or takes the residual stream where the bundle has
    no engine's end.
    """
    bundle = Bundle.open(directory)
    found = DrafterFile.load(file)
    shape, manifest = found.drafter.shape, bundle.manifest
    head = HeadGraph.load(bundle)
    check_shape(bundle, shape)
    sampled = found.tokens[: len(found.head_sample)].numpy()
    found.check_head(torch.from_numpy(head.rows(sampled)), str(bundle.directory))
    rows = head.rows(found.tokens.numpy())
    entry = DrafterEntry(
        state=STATE_ENGINE,
        file=DRAFT_ENGINE,
        feature_layers=list(shape.feature_layers),
        key_value_size=shape.key_value_heads * shape.head_size,
        tokens=found.tokens.tolist(),
    )
    with edited_bundle(bundle) as staging:
        for engine, graph in (
            (STATE_ENGINE, state_graph(found.drafter)),
            (DRAFT_ENGINE, draft_graph(found.drafter, rows)),
        ):
            (staging / engine).unlink(missing_ok=True)
            save_engine(graph, staging / engine)
        (staging / DRAFTER).unlink(missing_ok=True)
        found.save(staging / DRAFTER)
        whole = manifest.model_copy(update={"drafter": entry, "files": list_files(staging)})
        write_manifest(staging, whole)
        Bundle.open(staging)
    return entry


def check_shape(bundle: Bundle, shape: DrafterShape) -> None:
    """Raise SedacError where `bundle` can have no drafter of `shape`, whatever it is trained to."""
    facts, name = bundle.manifest.model, str(bundle.directory)
    own = (facts.hidden_size, facts.vocab_size, facts.num_layers)
    if (shape.hidden_size, shape.vocab_size, shape.feature_layers[-1]) != own:
        raise SedacError(
            f"the drafter is for a model of hidden size {shape.hidden_size}, {shape.vocab_size}"
            f" tokens and {shape.feature_layers[-1]} layers, {name} for one of {own[0]}, {own[1]}"
            f" and {own[2]}; train one for it with sedac-export train-drafter"
        )
    ends = {entry.first_layer + entry.num_layers for entry in bundle.manifest.engines.layers}
    if missing := sorted(set(shape.feature_layers) - ends):
        raise SedacError(
            f"the drafter takes hidden states after layer {missing[0]}, where {name} has no"
            " engine's end; build the bundle with --layers-per-engine 1"
        )
    embed = onnx.load_model_from_string(bundle.read(bundle.manifest.engines.embed))
    if any(value.name == "position_ids" for value in embed.graph.input):
        raise SedacError(
            f"{name} is of a model that embeds positions, for which no drafter can be trained;"
            " use another drafter"
        )

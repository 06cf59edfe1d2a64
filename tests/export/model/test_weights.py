"""Every tensor of a checkpoint is a weight of the engines, or is refused or listed by name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyBundle
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from sedac_export import SedacError
from sedac_export.build.validate import text_chunks, validate
from sedac_export.bundle.manifest import read_manifest
from sedac_export.graph.modules import learn_interface
from sedac_export.graph.operators import AttentionRouter
from sedac_export.graph.trace import Tracer
from sedac_export.graph.trace_model import fused_operators
from sedac_export.model.skeleton import Skeleton, kind_of, stand_in_weights
from sedac_export.model.weights import weights_of

WEIGHTS = "model.safetensors"
SCALAR = "model.layers.1.layer_scalar"


def change(model: Path, **tensors: torch.Tensor) -> None:
    weights = load_file(model / WEIGHTS)
    weights.update(tensors)
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["gemma4"])
def test_buffers_are_weights(name: str, tiny_bundle: Callable[[str], TinyBundle]) -> None:
    _, bundle = tiny_bundle(name)
    skeleton = Skeleton.load(bundle.parent / "model")
    assert skeleton.sources.names[SCALAR] == SCALAR
    assert SCALAR in dict(weights_of(skeleton.model))
    assert read_manifest(bundle).unread_tensors == []


def as_it_is(_: str, weight: torch.Tensor) -> torch.Tensor:
    return weight


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["gemma4"])
def test_the_reference_is_the_checkpoint(
    name: str, tiny_bundle: Callable[[str], TinyBundle], tmp_path: Path
) -> None:
    """A buffer that only the checkpoint knows is missed in engines that lack it."""
    _, bundle = tiny_bundle(name)
    model = shutil.copytree(bundle.parent / "model", tmp_path / "model")
    skeleton, manifest = Skeleton.load(model), read_manifest(bundle)
    validate(skeleton, bundle, manifest, 1e-4, as_it_is).check()
    change(model, **{SCALAR: torch.tensor([0.7])})
    with pytest.raises(SedacError, match="layer_001 differs from the original"):
        validate(skeleton, bundle, manifest, 1e-4, as_it_is).check()


def test_rotary_frequencies_and_copies_of_tied_weights_may_go_unread(tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path)
    embedding = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {"lm_head.weight": embedding.clone(), frequencies: torch.ones(8)}
    change(tmp_path, **extra)
    skeleton = Skeleton.load(tmp_path)
    read = set(skeleton.sources.names.values())
    assert skeleton.sources.unread(skeleton.checkpoint, read) == sorted(extra)
    with pytest.raises(SedacError, match=r"no engine reads weight model\.norm\.weight"):
        skeleton.sources.unread(skeleton.checkpoint, read - {"model.norm.weight"})


def test_tied_weights_that_differ_are_both_read(tmp_path: Path) -> None:
    """As transformers does: it ties what is equal."""
    save_tiny_model("qwen2", tmp_path)
    embedding = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    change(tmp_path, **{"lm_head.weight": embedding + 1})
    assert Skeleton.load(tmp_path).sources.names["lm_head.weight"] == "lm_head.weight"


def test_a_tied_weight_under_the_other_name_is_put_right_by_transformers(tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(SedacError, match=r"model.embed_tokens.weight.*save_pretrained"):
        Skeleton.load(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    names = Skeleton.load(tmp_path / "again").sources.names
    assert names["lm_head.weight"] == "model.embed_tokens.weight"


@pytest.mark.parametrize("kind", ["buffer", "tensor", "list"])
def test_layers_that_differ_in_constants_are_no_kind(kind: str) -> None:
    def layer(value: float, index: int) -> nn.Module:
        module = nn.Linear(2, 2)
        if kind == "buffer":
            module.register_buffer("scale", torch.tensor([value]), persistent=False)
        else:
            module.scale = torch.tensor([value]) if kind == "tensor" else [{"scale": value}]
        module.layer_idx = index
        return module

    assert kind_of(layer(0.5, 0)) == kind_of(layer(0.5, 1))
    assert kind_of(layer(0.5, 0)) != kind_of(layer(0.25, 0))


def test_stand_ins_look_like_nothing_in_particular(tmp_path: Path) -> None:
    save_tiny_model("gemma4", tmp_path)
    skeleton, router = Skeleton.load(tmp_path), AttentionRouter()
    with stand_in_weights(skeleton.model, torch.float32), fused_operators(skeleton.model, router):
        weights = dict(weights_of(skeleton.model))
        interface = learn_interface(skeleton, router)
        tracer = Tracer(skeleton, interface, router)
        inputs = tracer.shared_inputs() | tracer.past(0)
    contexts = inputs.pop("contexts")
    for stand_in in [*weights.values(), *contexts, *inputs.values()]:
        assert not ((stand_in == 0) | (stand_in == 1)).any()
    for weight in weights.values():
        assert weight.ndim < 2 or not torch.equal(weight[0], weight[1])
        assert weight.untyped_storage().nbytes() <= 4 * sum(weight.shape)
    assert all(tensor.device.type == "meta" for tensor in skeleton.model.parameters())


@pytest.mark.parametrize(
    ("room", "changes", "first"),
    [(4096, [], 256), (4096, [50, 512], 528), (4096, [4090, 9000], 4088), (9, [], 1)],
)
def test_validation_crosses_what_the_bundle_has_room_for(
    room: int, changes: list[int], first: int
) -> None:
    chunks = text_chunks(room, changes)
    assert [chunk.stop - chunk.start for chunk in chunks] == [first, 7, 1]


def test_validation_of_a_short_cache_goes_token_by_token() -> None:
    assert [chunk.stop for chunk in text_chunks(3, [2])] == [1, 2, 3]

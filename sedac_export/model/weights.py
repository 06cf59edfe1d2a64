"""Which tensor of the checkpoint is which weight of the model. Nothing is left over unsaid."""

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from sedac_export.errors import SedacError
from sedac_export.model.checkpoint import Checkpoint

# the model computes these itself, from its configuration
_ROTARY = re.compile(r"(^|\.)rotary_emb\w*\.inv_freq$")

_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class WeightSources:
    """The checkpoint's name of every weight, and its tensors that may go unread by rule.

    Those are copies of tied weights, and rotary inverse frequencies.
    """

    names: dict[str, str]
    spare: frozenset[str]

    def unread(self, checkpoint: Checkpoint, read: Set[str]) -> list[str]:
        """The tensors of `checkpoint` beside those that engines `read`.

        Raises SedacError naming the first of them that may not go unread.
        """
        left = sorted(checkpoint.files.keys() - read)
        lost = [name for name in left if name not in self.spare]
        if lost:
            raise SedacError(
                f"{checkpoint.directory}: no engine reads weight {lost[0]}, so what it does would"
                " be lost; only decoders whose every weight a text passes are supported"
            )
        return left


def weights_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer below `module`, under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def find_sources(model: PreTrainedModel, checkpoint: Checkpoint) -> WeightSources:
    """Where `checkpoint` holds each weight of `model`.

    Raises SedacError when it lacks one, holds one of another shape or of a quantized type, or holds
    a tensor that the model has no place for.
    """
    weights = dict(weights_of(model))
    stored = _renamed(model, checkpoint)
    spare = _without_place(model, checkpoint, stored, weights.keys())
    names = {}
    for weight, value in weights.items():
        names[weight] = _source(weight, stored, _tied(model), checkpoint)
        _check_stored(weight, value, names[weight], checkpoint)
    copies = set(stored.values()) - set(names.values())
    return WeightSources(names, frozenset(spare | copies))


def _renamed(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's tensors by the names that transformers knows them under.

    Names differ where a checkpoint is of the bare model or older than a renaming in transformers.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters: list[Any] = [t for t in transforms if not isinstance(t, WeightRenaming)]
    state = model.state_dict()
    stored: dict[str, str] = {}
    for name in checkpoint.files:
        renamed, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if converted is not None:
            raise SedacError(
                f"{checkpoint.directory}: transformers converts weight {name} while loading;"
                " load the model and save_pretrained() it in its present form first"
            )
        if renamed in stored:
            raise SedacError(
                f"{checkpoint.directory} holds weight {renamed} twice, as {stored[renamed]} and as"
                f" {name}; load the model with transformers and save_pretrained() it once"
            )
        stored[renamed] = name
    return stored


def _without_place(
    model: PreTrainedModel, checkpoint: Checkpoint, stored: dict[str, str], weights: Set[str]
) -> set[str]:
    """Take what is no weight of the model out of `stored`; all of it must be computed anyway."""
    computed = set()
    for renamed in sorted(stored.keys() - weights):
        name = stored.pop(renamed)
        if not _ROTARY.search(renamed):
            raise _no_place(model, checkpoint, name, renamed)
        computed.add(name)
    return computed


def _no_place(
    model: PreTrainedModel, checkpoint: Checkpoint, name: str, renamed: str
) -> SedacError:
    start = f"{checkpoint.directory} holds {name}, which {type(model).__name__} has no place for"
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    if any(re.search(pattern, key) for pattern in ignored for key in (name, renamed)):
        return SedacError(
            f"{start} and transformers ignores; load the model with transformers and"
            " save_pretrained() it once to drop it"
        )
    return SedacError(
        f"{start}, so what it does would be lost; if a quantizer left it, export the model that was"
        " quantized, else bring the config.json that belongs to these weights"
    )


def _tied(model: PreTrainedModel) -> dict[str, str]:
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return tied


def _source(
    weight: str, stored: dict[str, str], tied: dict[str, str], checkpoint: Checkpoint
) -> str:
    """The tensor that holds `weight`: its own, or that of a weight that it is tied to.

    As transformers does, weights that are stored apart are tied only where they are equal.
    """
    first = tied.get(weight, weight)
    source = stored.get(first)
    if source is None:
        copies = [name for name, other in tied.items() if other == first and name in stored]
        remedy = (
            f", only {copies[0]}, which is tied to it; load the model with transformers and"
            " save_pretrained() it once"
            if copies
            else "; is the download complete?"
        )
        raise SedacError(f"{checkpoint.directory} holds no weight {first}{remedy}")
    own = stored.get(weight, source)
    return source if _equal(checkpoint, own, source) else own


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    if name == other:
        return True
    if checkpoint.shape(name) != checkpoint.shape(other):
        return False
    pairs = zip(checkpoint.pieces(name), checkpoint.pieces(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _check_stored(weight: str, value: torch.Tensor, source: str, checkpoint: Checkpoint) -> None:
    shape = checkpoint.shape(source)
    if shape != tuple(value.shape):
        raise SedacError(
            f"{checkpoint.directory}: weight {weight} has shape {list(shape)} where config.json"
            f" asks for {list(value.shape)}; do the two belong together?"
        )
    dtype = checkpoint.dtype(source)
    if dtype not in _DTYPES or not value.is_floating_point():
        raise SedacError(
            f"{checkpoint.directory}: weight {weight} is stored as {dtype}, and engines store"
            " floating-point numbers of 16 bits and more; export the model before it was quantized"
        )

"""A model without its weights: the structure that the export cuts into engines."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from sedac_export.checkpoint import Checkpoint
from sedac_export.errors import SedacError

_ROPE_THAT_CHANGES_WITH_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Skeleton:
    """A causal language model on the meta device, and where its weights are."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    layers_path: str
    sources: dict[str, str]

    @classmethod
    def load(cls, directory: Path) -> "Skeleton":
        """Build the model of `directory` without weights.

        Raises SedacError when the model type is unknown or config.json cannot be used, when the
        model has no list of decoder layers, or when the checkpoint lacks a weight or holds one of
        another shape.
        """
        config = _config(directory)
        checkpoint = Checkpoint.open(directory)
        with _parameters_on_meta(), _config_errors(directory):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation="eager", dtype=torch.float32
            )
        layers_path = _find_layers(model, directory)
        sources = _sources(model, checkpoint)
        _check_shapes(model, checkpoint, sources)
        return cls(model.eval(), checkpoint, layers_path, sources)

    @property
    def config(self) -> PretrainedConfig:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, shallowest first."""
        layers = self.model.get_submodule(self.layers_path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def pieces(self, parameter: str) -> Iterator[torch.Tensor]:
        """The value of `parameter` in the checkpoint's dtype, some rows at a time."""
        return self.checkpoint.pieces(self.sources[parameter])

    def max_positions(self) -> int | None:
        """The longest context that the positions are defined for, None when there is no bound.

        Rotary tables that are recomputed from the running length are exported for the lengths up
        to the one at which they start to change.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") in _ROPE_THAT_CHANGES_WITH_LENGTH:
            limit = rope.get("original_max_position_embeddings") or limit
        return limit


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """What two layers must share so that one traced graph serves both.

    Every plain attribute counts but the layer's own index, so layers that differ in window, scale
    or norm placement are traced apart without knowing any architecture by name.
    """
    modules = tuple(
        (name, type(module).__qualname__, tuple(sorted(_plain_attributes(module))))
        for name, module in layer.named_modules()
    )
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return modules, shapes


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if name in ("layer_idx", "layer_id", "training"):
            continue
        if isinstance(value, bool | int | float | str | tuple | None):
            yield name, repr(value)


def _config(directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").exists():
        raise SedacError(f"{directory} holds no config.json; is it a model directory?")
    with _config_errors(directory):
        # code that comes with a model is neither run nor asked about
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise SedacError(
            f"{directory} is a {config.model_type} model with an encoder; SEDAC exports decoders"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SedacError(
            f"{directory} is a {config.model_type} model, which transformers does not know"
            " as a causal language model; SEDAC exports decoders"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise SedacError(
            f"{directory} holds quantized weights (quantization_config in config.json); export the"
            " model that they were quantized from"
        )
    return config


@contextlib.contextmanager
def _config_errors(directory: Path) -> Iterator[None]:
    """What transformers has against a config.json, as a SedacError."""
    try:
        yield
    except Exception as error:  # its own validators, torch and missing keys each raise another type
        reason = " ".join(str(error).strip().splitlines()[:2])
        if isinstance(error, KeyError):
            reason = f"unknown value {reason}"
        raise SedacError(f"{directory}/config.json cannot be used: {reason}") from error


def _sources(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name of every parameter of `model`.

    Names differ where a checkpoint is of the bare model or older than a renaming in transformers;
    tied weights are stored once.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters: list[Any] = [t for t in transforms if not isinstance(t, WeightRenaming)]
    state = model.state_dict()
    stored = {}
    for name in checkpoint.files:
        renamed, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if converted is not None:
            raise SedacError(
                f"{checkpoint.directory}: transformers converts weight {name} while loading;"
                " load the model and save_pretrained() it in its present form first"
            )
        stored[renamed] = name
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    sources = {}
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        source = stored.get(parameter) or stored.get(tied.get(parameter, ""))
        if source is None:
            raise SedacError(
                f"{checkpoint.directory} holds no weight {parameter}; is the download complete?"
            )
        sources[parameter] = source
    return sources


def _check_shapes(model: nn.Module, checkpoint: Checkpoint, sources: dict[str, str]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored = checkpoint.shape(sources[name])
        if stored != tuple(parameter.shape):
            raise SedacError(
                f"{checkpoint.directory}: weight {name} has shape {list(stored)} where config.json"
                f" asks for {list(parameter.shape)}; do the two belong together?"
            )


def _find_layers(model: nn.Module, directory: Path) -> str:
    """Path of the list of decoder layers: the list with one entry per hidden layer."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    paths: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not paths:
        raise SedacError(
            f"{directory}: {type(model).__name__} has no list of {count} decoder layers to split"
        )
    return min(paths, key=lambda path: path.count("."))


@contextlib.contextmanager
def stand_in_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give every parameter zeros of its shape that take no memory: one number, repeated."""
    saved = []
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                zeros = torch.zeros((), dtype=dtype).expand(parameter.shape)
                saved.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in saved:
            module._parameters[name] = parameter


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters take no memory; buffers (rotary frequencies, scales) are computed as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None and value.device.type != "meta":
            value = nn.Parameter(value.to("meta"), requires_grad=False)
        register(self, name, value)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

"""A model without its weights: the structure that the export cuts into engines."""

import contextlib
import hashlib
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

from sedac_export.errors import SedacError
from sedac_export.model.checkpoint import Checkpoint
from sedac_export.model.support import check_config, check_modules, check_no_adapter, check_no_code
from sedac_export.model.weights import WeightSources, find_sources, weights_of

# attributes that hold a layer's own index; a layer that computes with it fails validation
_OWN_INDEX = ("layer_idx", "layer_id", "layer_number")
_INTERNALS = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Skeleton:
    """A causal language model on the meta device, and where its weights are.

    Weights are all tensors of the checkpoint: parameters and persistent buffers alike.
    """

    model: PreTrainedModel
    directory: Path
    checkpoint: Checkpoint
    layers_path: str
    sources: WeightSources

    @classmethod
    def load(cls, directory: Path) -> "Skeleton":
        """Build the model of `directory` without weights.

        Raises SedacError when the model type is unknown, config.json cannot be used or declares
        what the engines cannot express, when the model has no list of decoder layers, or when the
        checkpoint lacks a weight, holds one of another shape, or one that the model does not have.
        """
        config = _config(directory)
        checkpoint = Checkpoint.open(directory)
        with _parameters_on_meta(), _config_errors(directory):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation="eager", dtype=torch.float32
            )
        check_modules(model, directory)
        layers_path = _find_layers(model, directory)
        return cls(
            model.eval(), directory, checkpoint, layers_path, find_sources(model, checkpoint)
        )

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

    def max_positions(self) -> int | None:
        """The longest context that the positions are defined for, None when there is no bound.

        Rotary tables of two sets, for short texts and long ones, are exported for the lengths up
        to the one at which they change.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            limit = rope.get("original_max_position_embeddings") or limit
        return limit


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """What two layers must share so that one traced graph serves both.

    Every attribute counts but the layer's own index, so layers that differ in window, scale or
    norm placement are traced apart without knowing any architecture by name. So do the numbers of
    tensors that are no weights: the graph holds them as constants.
    """
    modules = tuple(
        (name, type(module).__qualname__, tuple(sorted(_constants(module))))
        for name, module in layer.named_modules()
    )
    shapes = tuple((name, tuple(weight.shape)) for name, weight in weights_of(layer))
    return modules, shapes


def _constants(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The module's own attributes as text, and the values of its tensors that are not weights."""
    for name, value in vars(module).items():
        if name not in _OWN_INDEX and name not in _INTERNALS:
            yield name, _as_text(value)
    for name in module._non_persistent_buffers_set:
        yield name, _as_text(module._buffers[name])


def _as_text(value: Any) -> str:
    """`value` as text: equal for equal data; of anything else the type and name."""
    if isinstance(value, torch.Tensor):
        numbers = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(numbers.data).hexdigest()}"
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        return f"{type(value).__name__}{[_as_text(item) for item in value]}"
    if isinstance(value, dict):
        return f"dict{[(_as_text(key), _as_text(item)) for key, item in value.items()]}"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _config(directory: Path) -> PretrainedConfig:
    check_no_adapter(directory)
    if not (directory / "config.json").exists():
        raise SedacError(f"{directory} holds no config.json; is it a model directory?")
    check_no_code(directory)
    with _config_errors(directory):
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
    check_config(config.get_text_config(), directory)
    return config


@contextlib.contextmanager
def _config_errors(directory: Path) -> Iterator[None]:
    """Raise transformers' objection to a config.json as a SedacError."""
    try:
        yield
    except Exception as error:  # its own validators, torch and missing keys each raise another type
        reason = " ".join(str(error).strip().splitlines()[:2])
        if isinstance(error, KeyError):
            reason = f"unknown value {reason}"
        raise SedacError(f"{directory}/config.json cannot be used: {reason}") from error


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
    """Give every weight random numbers of its shape that take next to no memory."""
    saved = []
    for module in model.modules():
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in tensors:
            for name, weight in list(own.items()):
                if weight is not None and name not in module._non_persistent_buffers_set:
                    saved.append((own, name, weight))
                    own[name] = _stand_in(weight, dtype)
    try:
        yield
    finally:
        for own, name, weight in saved:
            own[name] = weight


def _stand_in(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor like `weight` whose rows overlap in memory, each one number further on.

    No two rows or columns are alike, so that nothing looks repeated or constant that is not.
    """
    count = 1 + sum(size - 1 for size in weight.shape)
    generator = torch.Generator().manual_seed(count)
    numbers = torch.empty(count).uniform_(0.05, 0.15, generator=generator).to(dtype)
    strided = numbers.as_strided(weight.shape, [1] * weight.ndim)
    if isinstance(weight, nn.Parameter):
        return nn.Parameter(strided, requires_grad=False)
    return strided


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

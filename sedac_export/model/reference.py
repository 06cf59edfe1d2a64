"""Run the original model as transformers loads it, to compare engines against."""

import contextlib
import inspect
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sedac_export.errors import SedacError
from sedac_export.model.skeleton import Skeleton
from sedac_export.model.weights import weights_of

# called with a number of layers and the residual stream [1, tokens, hidden] after them
Observer = Callable[[int, Tensor], None]
# gives the numbers that engines compute with in the place of a weight of that name
Rounding = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """The original model, loaded by transformers, with its masks and eager attention."""

    model: PreTrainedModel
    layers: nn.Module

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, kept: int, observe: Observer) -> Tensor:
        """Logits of `input_ids` [1, tokens].

        At most the newest `kept` positions' come back, [1, positions, vocabulary], where the model
        can leave out the others.
        """
        wanted = inspect.signature(self.model.forward).parameters
        few = {"logits_to_keep": kept} if "logits_to_keep" in wanted else {}
        with _observed(self.layers, observe):
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **few).logits
        return logits


@contextlib.contextmanager
def opened_reference(skeleton: Skeleton, rounding: Rounding) -> Iterator[Reference]:
    """The model that from_pretrained gives; of `skeleton` only names are used.

    Weights are rounded by `rounding` as they are in the bundle and computed with in fp32; each
    module's are in memory only while it runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = _load(skeleton.directory, folder)
        _round_weights(model, rounding)
        yield Reference(model, model.get_submodule(skeleton.layers_path))


def _load(directory: Path, folder: str) -> PreTrainedModel:
    """The model of `directory` with its weights left on disk until they are used."""
    return load_original(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        device_map={"": "disk"},
        offload_folder=folder,
    )


def load_original(directory: Path, **settings: Any) -> PreTrainedModel:
    """The model that from_pretrained gives with `settings`.

    Raises SedacError where it cannot be loaded, or lacks a weight or has no place for one.
    """
    with _quiet(), _loading_errors(directory):
        loaded: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore
            directory, output_loading_info=True, use_safetensors=True, **settings
        )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[kind]:
            raise SedacError(
                f"{directory}: transformers reports {kind.replace('_', ' ')} while loading:"
                f" {sorted(map(str, info[kind]))[0]}; is the download complete?"
            )
    original: PreTrainedModel = model.eval()
    return original


@contextlib.contextmanager
def _loading_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and accelerate raise errors of many types
        reason = next(iter(str(error).splitlines()), "")
        raise SedacError(
            f"{directory}: transformers cannot load the model ({type(error).__name__}: {reason}),"
            " which engines are compared with and drafters trained for; save it again with"
            " save_pretrained()"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What loading has to say is in the loading information; the rest is about disks."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class _Rounding(ModelHook):  # type: ignore[misc]
    """Rounds a module's weights once they are in memory, before it runs."""

    def __init__(self, path: str, rounding: Rounding) -> None:
        self.path, self.rounding = path, rounding

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, weight in module._parameters.items():
            if weight is not None:
                weight.data = self.rounding(f"{self.path}{name}", weight.data)
        return args, kwargs


def _round_weights(model: nn.Module, rounding: Rounding) -> None:
    for path, module in model.named_modules():
        if module._parameters:
            hook = _Rounding(f"{path}." if path else "", rounding)
            add_hook_to_module(module, hook, append=True)
    for name, weight in weights_of(model):
        if not isinstance(weight, nn.Parameter):
            weight.copy_(rounding(name, weight))


@contextlib.contextmanager
def _observed(layers: nn.Module, observe: Observer) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe(0, (args[0] if args else kwargs["hidden_states"]).clone())

    def after(depth: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            # the next layer may write into it
            observe(depth, (output[0] if isinstance(output, tuple) else output).clone())

        return hook

    modules = list(layers.children())
    handles = [modules[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after(i + 1)) for i, layer in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

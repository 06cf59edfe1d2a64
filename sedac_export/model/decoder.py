"""The parts of a transformers decoder that exits concern, found without knowing its name."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from sedac_export.errors import SedacError

# what transformers has called the argument that takes a cache, from its latest releases back
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")


def cache_argument(parameters: Collection[str]) -> str:
    """The one of a decoder layer's `parameters` that takes a cache.

    Raises SedacError when none does.
    """
    found = [name for name in CACHE_ARGUMENTS if name in parameters]
    if not found:
        raise SedacError("the decoder layer takes no cache argument; this model is not supported")
    return found[0]


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of `model`. Raises SedacError when it has no list of them."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise SedacError(f"{type(model).__name__} has no list of {count} decoder layers to exit")
    return list(lists[0])


def find_mlp(layer: nn.Module) -> nn.Module:
    """The submodule of a decoder layer whose output is what its MLP adds, before any norm of it.

    Raises SedacError when the layer has nothing but attention and norms.
    """
    found = [
        module
        for name, module in layer.named_children()
        if "attn" not in name and "attention" not in name and _multiplies(module)
    ]
    if not found:
        raise SedacError(f"{type(layer).__name__} has no MLP beside its attention")
    return found[-1]


@contextlib.contextmanager
def replaced(owner: Any, value: Any, name: str = "forward") -> Iterator[None]:
    """Within this context `owner`'s method `name` is `value`."""
    had = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had is None:
            delattr(owner, name)
        else:
            setattr(owner, name, had)


def _multiplies(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())

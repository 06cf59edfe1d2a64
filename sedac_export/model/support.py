"""What a model may not be: refused by name, before any of it is traced."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from sedac_export.errors import SedacError

_EXPERTS = re.compile("expert|moe(?![a-z])", re.IGNORECASE)
_BOUNDARY = re.compile("window|chunk|original_max_position")


def check_no_adapter(directory: Path) -> None:
    """Raise SedacError when the model in `directory` has an adapter.

    Where PEFT is installed, transformers puts it on the weights; without, it leaves it out.
    """
    if (directory / "adapter_config.json").exists():
        raise SedacError(
            f"{directory} holds an adapter (adapter_config.json), which SEDAC does not put on the"
            " weights; merge it into the model first (merge_and_unload() of PEFT), or move it"
            " elsewhere to export the model without it"
        )


def check_no_code(directory: Path) -> None:
    """Raise SedacError when the model in `directory` comes with code of its own.

    transformers would take its own class where it has one of that type, which may be another model.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
        kind, code = config["model_type"], config["auto_map"]
    except (ValueError, KeyError, TypeError):
        return  # no JSON and no type are transformers' to report
    if not code:
        return
    known = kind in CONFIG_MAPPING
    remedy = (
        f"if transformers' own {kind} is the same model, remove auto_map from config.json"
        if known
        else "export a model whose type transformers knows"
    )
    raise SedacError(
        f"{directory}/config.json brings custom code (auto_map), which is not run; {remedy}"
    )


def check_config(config: PretrainedConfig, directory: Path) -> None:
    """Raise SedacError when the text model's `config` declares what engines cannot express."""
    refuse = _Refusal(directory, config)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        raise refuse(
            "its rotary tables change with every length (rope_type dynamic)",
            f"set rope_type to default in config.json, which is the same up to {length} positions",
        )
    for layer_type, parameters in rope.items():
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind in ("dynamic", "longrope"):
            raise refuse(
                f"the rotary tables of its {layer_type} layers change with the length"
                f" (rope_parameters: {kind})",
                "export one whose rope_parameters are the same for all layers",
            )
    if getattr(config, "hidden_size_per_layer_input", None):
        raise refuse(
            "it has per-layer embeddings (hidden_size_per_layer_input), which no engine carries",
            "export one without",
        )
    if getattr(config, "num_kv_shared_layers", None):
        raise refuse(
            "layers share keys and values (num_kv_shared_layers), and each engine has its own",
            "export one whose every layer has its own",
        )


def check_modules(model: PreTrainedModel, directory: Path) -> None:
    """Raise SedacError when `model` keeps states that are no keys and values, or has experts."""
    refuse = _Refusal(directory, model.config)
    # transformers marks recurrent models so, and convolutions over tokens by their layers' types
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if model._is_stateful or "conv" in layer_types:
        raise refuse(
            "its layers keep a state other than keys and values, as state-space models do, and"
            " engines have no cache for one",
            "export one whose every layer attends",
        )
    for path, module in model.named_modules():
        name = type(module).__name__
        if path and _EXPERTS.search(name):
            raise refuse(
                f"it is a mixture of experts ({path} is {name}), and engines compute every weight"
                " for every token",
                "export a dense one",
            )


def check_stops(stops: list[Any], vocabulary: int, directory: Path) -> None:
    """Raise SedacError when an end-of-text id is none of `vocabulary` tokens."""
    for token in stops:
        is_number = isinstance(token, int) and not isinstance(token, bool)
        if not is_number or not 0 <= token < vocabulary:
            raise SedacError(
                f"{directory}: eos_token_id {token} is none of the model's {vocabulary} tokens;"
                " correct it in config.json and generation_config.json"
            )


def boundaries(config: PretrainedConfig) -> list[int]:
    """Every length at which `config` says that attention or rotary tables change, ascending."""
    return sorted(set(_declared(config.to_dict())))


def _declared(settings: dict[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _declared(value)
        elif isinstance(value, int) and not isinstance(value, bool) and _BOUNDARY.search(str(name)):
            yield value


class _Refusal:
    def __init__(self, directory: Path, config: PretrainedConfig) -> None:
        self.start = f"{directory} is a {config.model_type} model that SEDAC cannot export"

    def __call__(self, reason: str, remedy: str) -> SedacError:
        return SedacError(f"{self.start}: {reason}; {remedy}")

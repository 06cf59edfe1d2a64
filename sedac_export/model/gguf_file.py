"""A GGUF file as a model directory, dequantised by transformers.

transformers passes over what it does not know of such a file, and gives a weight that is missing
random numbers. So everything in the file is accounted for here before the result is used. Damage
to the numbers themselves cannot be seen: GGUF has no checksums.
"""

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

from sedac_export.errors import SedacError
from sedac_export.model.precision import stored

_PACKAGES = ("accelerate", "gguf")
_NO_MODELS = ("general", "tokenizer")
_LAYER = re.compile(r"blk\.(\d+)\.")
_ALIGNMENT = 32

# pre-tokenizers that split text as GPT-2's does, which transformers takes for all it does not know
_AS_GPT2 = ("gpt-2", "mpt", "olmo")

# the order in which older converters wrote weights; the tensors' names show it as well
_WITHOUT_MEANING = ("tensor_data_layout",)


def convert(file: Path, directory: Path) -> PreTrainedTokenizerBase | None:
    """Write the model of a GGUF file into `directory`, fp32; its tokenizer, None where it has none.

    The tokenizer is not written: for some model types reading it back would give a different one.
    All weights are in memory as fp32 during this, about twice.

    Raises SedacError when a package is missing, and when the file is damaged, of an architecture
    that transformers does not read, or holds something that would be lost; OSError when the
    weights cannot be written.
    """
    _require_packages(file)
    with _quiet():
        with _damage(file):
            model, tokenizer = _read(file, directory)
        try:
            model.save_pretrained(directory)
        except SafetensorError as error:  # also for a full disk
            raise OSError(str(error)) from error
    return tokenizer


def tokenizer_note(file: Path) -> str | None:
    """In what the tokenizer that transformers makes of the file may differ from the model's own."""
    metadata, _ = read_gguf_metadata(str(file))
    kind, split = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or split in GGUF_PRE_TOKENIZER_SPLITS or split in _AS_GPT2:
        return None
    return (
        f"the file's tokenizer splits text by the rule {split or '(unnamed)'}, which transformers"
        " does not know and replaces by GPT-2's: some texts become other tokens than in training"
    )


def _read(file: Path, directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    metadata, names = read_gguf_metadata(str(file))
    _check_kind(file, metadata)
    _check_extent(file, metadata)
    _check_depth(metadata, names)
    # a tokenizer.json beside the file would be taken in place of what the file holds
    (directory / file.name).symlink_to(file.resolve())
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": directory,
        "gguf_file": file.name,
        "local_files_only": True,
    }
    config = AutoConfig.from_pretrained(**where)
    _check_metadata(file, metadata, config)
    _check_names(file, metadata["general.architecture"], names, config)
    has_tokenizer = "tokenizer.ggml.model" in metadata
    tokenizer = AutoTokenizer.from_pretrained(**where) if has_tokenizer else None
    return _load(where, config), tokenizer


def _require_packages(file: Path) -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SedacError(
            f"{file}: reading GGUF takes the package {' and '.join(missing)}, which is not"
            " installed; pip install 'sedac[gguf]'"
        )


def _check_kind(file: Path, metadata: dict[str, Any]) -> None:
    if (parts := metadata.get("split.count", 1)) > 1:
        raise SedacError(
            f"{file} is one of {parts} parts of a model; join them with llama-gguf-split --merge"
        )
    architecture = metadata["general.architecture"]
    if architecture not in GGUF_CONFIG_MAPPING or architecture in _NO_MODELS:
        raise SedacError(
            f"{file} holds a model of architecture {architecture}, which transformers does not read"
            " from GGUF; export the model that the file was made from"
        )


def _check_extent(file: Path, metadata: dict[str, Any]) -> None:
    """Check that the tensors are contiguous and that the file holds all of them."""
    header = GgufHeader.from_file(str(file))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    end = 0
    for tensor in header.tensors:
        if tensor.offset != end:
            raise ValueError(f"{tensor.name} is at {tensor.offset}, not at {end}")
        end = -(-(end + tensor.nbytes) // alignment) * alignment
        if header.data_start + tensor.offset + tensor.nbytes > file.stat().st_size:
            raise ValueError(f"it ends within {tensor.name}")


def _check_depth(metadata: dict[str, Any], names: tuple[str, ...]) -> None:
    layers = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    said = metadata[f"{metadata['general.architecture']}.block_count"]
    if layers != set(range(len(layers))) or len(layers) != said:
        raise ValueError(f"it says {said} layers and holds {len(layers)}")


def _check_metadata(file: Path, metadata: dict[str, Any], config: PretrainedConfig) -> None:
    """Check that metadata which transformers does not read agrees with its configuration."""
    architecture = metadata["general.architecture"]
    read: dict[str, str | None] = GGUF_CONFIG_MAPPING[architecture]  # type: ignore[assignment]
    known = _known(config.get_text_config())
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or read.get(name) is not None or name in _WITHOUT_MEANING:
            continue
        if name not in known or known[name] != value:
            raise SedacError(
                f"{file} says {key} {value}, which transformers does not read; export the model"
                " that the file was made from"
            )


def _known(config: PretrainedConfig) -> dict[str, object]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return {
        "attention.causal": True,
        "attention.key_length": head,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attention.value_length": head,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1)),
        "rope.scaling.type": "none",
        "use_parallel_residual": getattr(config, "use_parallel_residual", None),
        "vocab_size": config.vocab_size,
    }


def _check_names(
    file: Path, architecture: str, names: tuple[str, ...], config: PretrainedConfig
) -> None:
    """Check that every tensor of the file is one of the model's."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SedacError(f"{file} is a {config.model_type} model; SEDAC exports decoders")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    kind: type[TensorProcessor] = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config.to_dict())
    known = get_gguf_hf_weights_map(model, processor)
    unread = sorted(set(names) - set(known))
    if unread:
        raise SedacError(
            f"{file} holds {unread[0]}, which transformers does not read; export the model that"
            " the file was made from"
        )


def _load(where: dict[str, Any], config: PretrainedConfig) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **where,
        config=config,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model: PreTrainedModel = loaded[0]
    for name in sorted(loaded[1]["missing_keys"]):
        raise ValueError(f"it holds no weight {name}")
    for name, shape, asked in sorted(loaded[1]["mismatched_keys"]):
        raise ValueError(f"{name} has shape {list(shape)} where it asks for {list(asked)}")
    for name, parameter in model.named_parameters():
        stored(parameter, "fp32", name)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which none of its settings turns off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Raise transformers' objection to a GGUF file as a SedacError."""
    try:
        yield
    except SedacError:
        raise
    except Exception as error:  # a damaged file raises whatever its numbers lead to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it holds no {reason}"
        raise SedacError(
            f"{file} is not a usable GGUF file: {reason}; is the download complete?"
        ) from error

"""GGUF files as llama.cpp's converter writes them, of random models with the demo's tokenizer."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from conftest import DEMO_MODEL
from tiny_models import save_tiny_model
from transformers import PreTrainedModel

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
VOCABULARY = 4096
_NORMAL, _CONTROL = 1, 3


def save_tiny_gguf_model(name: str, directory: Path) -> PreTrainedModel:
    """A random model that a GGUF file can hold: llama's has no place for biases."""
    biases = {"attention_bias": False, "mlp_bias": False} if name == "llama" else {}
    return save_tiny_model(name, directory, vocab_size=VOCABULARY, **biases)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, npt.NDArray[np.float32] | None] | None = None,
) -> Path:
    """Write a llama or qwen2 model, matrices as Q8_0.

    metadata: keys to add. tensors: what to add or, where None, to leave out, by GGUF's names.
    """
    config = model.config
    kind = config.model_type
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for key, value in (metadata or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key, value)
    for name, array in (_named(model) | (tensors or {})).items():
        if array is None:
            continue
        quantized = array.ndim > 1
        numbers = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0) if quantized else array
        dtype = gguf.GGMLQuantizationType.Q8_0 if quantized else None
        writer.add_tensor(name, numbers, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _named(model: PreTrainedModel) -> dict[str, npt.NDArray[np.float32] | None]:
    config = model.config
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors: dict[str, npt.NDArray[np.float32] | None] = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy().astype(np.float32)
        module = name.split(".")[-2]
        if config.model_type == "llama" and module in heads:
            # halves of rotary pairs become neighbours
            pairs = array.reshape(heads[module], 2, -1, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        stem, suffix = name.rsplit(".", 1)
        tensors[f"{names.get_name(stem)}.{suffix}"] = np.ascontiguousarray(array)
    return tensors


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    stored = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in stored["added_tokens"]}
    vocabulary = stored["model"]["vocab"] | special
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert len(tokens) == VOCABULARY
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    merges = stored["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(min(special.values()))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

"""Random tiny models of every supported architecture, saved as a user would have them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON = {
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    "max_position_embeddings": 256,
}
_LLAMA_LIKE = _COMMON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# every entry strays from its architecture's defaults where a shortcut in the export would show
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        _LLAMA_LIKE
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": ("qwen2", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", _LLAMA_LIKE | {"head_dim": 32}),
    "mistral": ("mistral", _LLAMA_LIKE | {"sliding_window": 9}),
    "gemma2": (
        "gemma2",
        _LLAMA_LIKE
        | {
            "head_dim": 16,
            "sliding_window": 9,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 24,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "phi3": (
        "phi3",
        _LLAMA_LIKE
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 256,
            "n_positions": 256,
            "n_embd": 64,
            "n_layer": 4,
            "n_head": 4,
            "scale_attn_by_inverse_layer_idx": True,
            "bos_token_id": 0,
            "eos_token_id": None,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        _COMMON
        | {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "use_parallel_residual": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "opt": (
        "opt",
        _COMMON
        | {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 48,
            "do_layer_norm_before": True,
        },
    ),
    "olmo2": ("olmo2", _LLAMA_LIKE),
}


def save_tiny_model(name: str, directory: Path, **changes: Any) -> PreTrainedModel:
    """Write a random model of architecture `name` to `directory`; returns it, fp32 and eager.

    Weights are larger than at initialisation, so that logits are far apart and a wrong term shows.
    """
    model_type, settings = ARCHITECTURES[name]
    config = AutoConfig.for_model(model_type, **(settings | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.15 if parameter.ndim > 1 else 0.3
            parameter.add_(torch.randn_like(parameter) * spread)
    model.eval().save_pretrained(directory)
    return model

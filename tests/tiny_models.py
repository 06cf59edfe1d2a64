"""Random tiny models of every supported architecture, saved as a user would have them."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"

_COMMON = {
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    "max_position_embeddings": 320,
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
            "n_positions": 320,
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


# what the general path takes as well; tests/test_architectures.py runs one long prompt of each
_SHALLOW = _LLAMA_LIKE | {"num_hidden_layers": 2}
_WIDE = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": None}
_WINDOW_THEN_ALL = {
    "sliding_window": 50,
    "layer_types": ["sliding_attention", "full_attention"],
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", _SHALLOW | _WINDOW_THEN_ALL | {"head_dim": 16}),
    "gemma4": (
        "gemma4_text",
        _SHALLOW
        | _WINDOW_THEN_ALL
        | {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0},
    ),
    "phi3 with longrope": (
        "phi3",
        _SHALLOW
        | {
            "original_max_position_embeddings": 310,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + n / 10 for n in range(8)],
                "long_factor": [2.0 + n / 5 for n in range(8)],
            },
        },
    ),
    "starcoder2": ("starcoder2", _SHALLOW | {"sliding_window": 50}),
    "cohere": ("cohere", _SHALLOW | {"logit_scale": 0.5}),
    "cohere2": ("cohere2", _SHALLOW | _WINDOW_THEN_ALL),
    "granite": (
        "granite",
        _SHALLOW
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "stablelm": ("stablelm", _SHALLOW | {"use_qkv_bias": True}),
    "smollm3": ("smollm3", _SHALLOW | {"no_rope_layers": [1, 0]}),
    "gptj": (
        "gptj",
        _WIDE | {"n_positions": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    ),
}

# what is refused, and words of the line that says why
_RECURRENT = _WIDE | {"hidden_size": 64, "num_hidden_layers": 2}
_EXPERTS = _SHALLOW | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "gemma3n": (
        "gemma3n_text",
        _SHALLOW
        | _WINDOW_THEN_ALL
        | {
            "head_dim": 16,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 256,
        },
        ["per-layer embeddings"],
    ),
    "gemma4 with experts": (
        "gemma4_text",
        _SHALLOW
        | {
            "head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        ["mixture of experts"],
    ),
    "gemma3 with dynamic rope": (
        "gemma3_text",
        _SHALLOW
        | _WINDOW_THEN_ALL
        | {
            "head_dim": 16,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
        },
        ["full_attention", "dynamic"],
    ),
    "llama with dynamic rope": (
        "llama",
        _SHALLOW | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ["dynamic", "rope_type to default", "320"],
    ),
    "llama with heads of 20": ("llama", _SHALLOW | {"head_dim": 20}, ["ONNX Runtime", "of 20"]),
    "llama4 without experts": (
        "llama4_text",
        _SHALLOW
        | {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "moe_layers": [],
            "attention_chunk_size": 50,
        },
        ["Llama4TextAttention", "mask"],
    ),
    "llama4": ("llama4_text", _EXPERTS | {"head_dim": 16}, ["mixture of experts"]),
    "mixtral": ("mixtral", _EXPERTS, ["mixture of experts"]),
    "qwen2_moe": ("qwen2_moe", _EXPERTS, ["mixture of experts"]),
    "qwen3_moe": ("qwen3_moe", _EXPERTS, ["mixture of experts"]),
    "phimoe": ("phimoe", _EXPERTS, ["mixture of experts"]),
    "olmoe": ("olmoe", _EXPERTS, ["mixture of experts"]),
    "granitemoe": ("granitemoe", _EXPERTS, ["mixture of experts"]),
    "gpt_oss": ("gpt_oss", _EXPERTS | {"head_dim": 16}, ["mixture of experts"]),
    "t5": ("t5", {"vocab_size": 256, "d_model": 64, "num_layers": 2}, ["encoder"]),
    "bloom": ("bloom", _WIDE | {"hidden_size": 64, "n_layer": 2, "n_head": 4}, ["BloomBlock"]),
    "falcon": ("falcon", _SHALLOW | {"alibi": True}, ["FalconDecoderLayer"]),
    "deepseek_v3": (
        "deepseek_v3",
        _SHALLOW
        | {
            "first_k_dense_replace": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        ["DeepseekV3Attention", "keys of 16"],
    ),
    "mamba": ("mamba", _RECURRENT, ["a state other than"]),
    "falcon_mamba": ("falcon_mamba", _RECURRENT, ["a state other than"]),
    "rwkv": ("rwkv", _RECURRENT | {"context_length": 320}, ["a state other than"]),
    "recurrent_gemma": (
        "recurrent_gemma",
        _SHALLOW | {"num_hidden_layers": 3},
        ["a state other than"],
    ),
    "qwen3_5": ("qwen3_5_text", _SHALLOW, ["a state other than"]),
    "lfm2": ("lfm2", _SHALLOW | {"full_attn_idxs": [1]}, ["a state other than"]),
}


def save_tiny_model(name: str, directory: Path, **changes: Any) -> "PreTrainedModel":
    """Write a random model of architecture `name` to `directory`; returns it, fp32 and eager.

    Weights are larger than at initialisation, so that logits are far apart and a wrong term shows;
    none is left at a constant, norms and persistent buffers included.
    """
    # imported here, so that the names of architectures can be read at once
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from sedac_export.model.weights import weights_of

    model_type, settings, *_ = (ARCHITECTURES | OTHERS | REFUSED)[name]
    config = AutoConfig.for_model(model_type, **(settings | changes))
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for _, weight in weights_of(model):
            spread = 0.15 if weight.ndim > 1 else 0.3
            weight.add_(torch.randn_like(weight) * spread)
    model.eval().save_pretrained(directory)
    return model


def save_model_with_tokenizer(directory: Path) -> None:
    """Write a random Llama with the demo's tokenizer and 32768 positions to `directory`."""
    save_tiny_model(
        "llama",
        directory,
        vocab_size=4096,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_DEMO_MODEL / name, directory / name)

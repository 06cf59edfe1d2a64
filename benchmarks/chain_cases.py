"""The shapes that the chain's kernel is checked and measured with."""

from chain_decoder import ChainCase

from sedac_export.bundle.cuda_entry import Activation, ChainOptions, ChainShape

_VECTORS = ("attention_norm", "mlp_norm", "qkv_bias")
_GEMMA_VECTORS = (*_VECTORS, "attention_post_norm", "mlp_post_norm", "query_norm", "key_norm")


def _shape(
    hidden: int, heads: tuple[int, int], head: int, intermediate: int, layers: int, vocabulary: int
) -> ChainShape:
    """heads: of queries, of keys and values."""
    return ChainShape(
        hidden=hidden,
        heads=heads[0],
        key_value_heads=heads[1],
        head_size=head,
        rotary_size=head,
        intermediate=intermediate,
        layers=layers,
        vocabulary=vocabulary,
    )


def _options(
    shape: ChainShape,
    activation: Activation = "silu",
    attention_softcap: float = 0.0,
    logits_softcap: float = 0.0,
    embedding_scale: float = 1.0,
) -> ChainOptions:
    return ChainOptions(
        activation=activation,
        norm_epsilon=1e-6,
        attention_scale=shape.head_size**-0.5,
        attention_softcap=attention_softcap,
        logits_softcap=logits_softcap,
        embedding_scale=embedding_scale,
    )


def _case(name: str, shape: ChainShape) -> ChainCase:
    return ChainCase(name, shape, _options(shape), _VECTORS)


_TINY = _shape(64, (4, 2), 16, 128, 6, 200)

# only checked
TINY = _case("tiny", _TINY)
TINY_GEMMA = ChainCase(
    "tiny, Gemma-like",
    _TINY,
    _options(_TINY, "gelu_tanh", 50.0, 30.0, 8.0),
    _GEMMA_VECTORS,
    window=700,
    capacity=2048,
    position=1952,
)

# checked and measured
MODELS = (
    _case("SmolLM2-135M", _shape(576, (9, 3), 64, 1536, 30, 49152)),
    _case("py-exit-24l", _shape(320, (5, 1), 64, 864, 24, 8192)),
    _case("Qwen2.5-0.5B", _shape(896, (14, 2), 64, 4864, 24, 151936)),
    _case("Qwen2.5-1.5B", _shape(1536, (12, 2), 128, 8960, 28, 151936)),
    _case("Llama-3.2-1B", _shape(2048, (32, 8), 64, 8192, 16, 128256)),
    _case("Mistral-7B", _shape(4096, (32, 8), 128, 14336, 32, 32768)),
)

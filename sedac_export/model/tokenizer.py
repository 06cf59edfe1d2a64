"""Store the tokenizer that transformers really uses, for a runtime without transformers."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sedac_export.errors import SedacError

_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x  # 3.14159 + 1e-5\n",
    "Grüße, naïve café: 你好世界 🙂 — “quotes”",
    "  leading,   inner\tand trailing   ",
)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model directory, None when the directory holds none.

    Raises SedacError when it has no fast form, which is all that the runtime can read.
    """
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        # code that comes with a model is neither run nor asked about
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers knows no other type
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise SedacError(
            f"{directory}: the tokenizer cannot be loaded: {reason}; is its download complete?"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise SedacError(
            f"{directory}: {type(tokenizer).__name__} has no fast form (tokenizer.json); convert it"
            " with transformers first"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write tokenizer.json and its configuration, and check that both sides give the same ids.

    For some model types AutoTokenizer replaces parts of the files it reads, so what is stored is
    the tokenizer in memory, not a copy of the files.

    Raises OSError when the files cannot be written, SedacError when the ids differ.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    try:
        tokenizer.save_pretrained(directory)
        backend.save(str(directory / "tokenizer.json"))
    except Exception as error:  # tokenizers knows no other type, nor for a full disk
        raise OSError(f"the tokenizer cannot be saved: {error}") from error
    stored = Tokenizer.from_file(str(directory / "tokenizer.json"))
    # a tokenizer may be told to take special tokens apart, which tokenizer.json cannot say
    for sample in (*_SAMPLES, f"a{'b '.join(tokenizer.all_special_tokens)}c"):
        if stored.encode(sample).ids != tokenizer(sample)["input_ids"]:
            raise SedacError(
                f"the stored tokenizer encodes {sample!r} differently from"
                f" {type(tokenizer).__name__}; this tokenizer is not supported"
            )

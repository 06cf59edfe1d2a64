"""What a model's generation_config.json says, of which a bundle takes the ends of texts alone."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from sedac_export.errors import SedacError

_FILE = "generation_config.json"

# settings by which transformers chooses other tokens without sampling, and what leaves it alone
_CHANGE_TOKENS: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "suppress_tokens": None,
}


def read_generation(directory: Path) -> GenerationConfig | None:
    """The generation configuration of the model in `directory`, None where there is none."""
    path = directory / _FILE
    if not path.exists():
        return None
    try:
        return GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise SedacError(f"{path} cannot be read; download it again") from error


def generation_note(directory: Path) -> str | None:
    """Which settings change the tokens that transformers generates, and not those of a bundle."""
    generation = read_generation(directory)
    settings = {name: getattr(generation, name, None) for name in _CHANGE_TOKENS}
    ignored = [
        f"{name} {value}"
        for name, value in settings.items()
        if value not in (None, [], {}, _CHANGE_TOKENS[name])
    ]
    if not ignored:
        return None
    return (
        f"of {_FILE} only eos_token_id is read: with its {', '.join(ignored)}, transformers"
        " generates other tokens than the bundle"
    )

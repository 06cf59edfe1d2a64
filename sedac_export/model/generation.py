"""What a model says of generating, of which a bundle takes the ends of texts alone."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from sedac_export.errors import SedacError

# the second is what transformers reads where a model, such as an older one, lacks the first
_FILES = ("generation_config.json", "config.json")

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
    "stop_strings": None,
    "suppress_tokens": None,
    "watermarking_config": None,
}


def read_generation(directory: Path) -> GenerationConfig | None:
    """What transformers takes for the generation configuration of the model in `directory`.

    None where neither of its files is there. Raises SedacError when the file cannot be read.
    """
    name = _file(directory)
    if name is None:
        return None
    try:
        return GenerationConfig.from_pretrained(
            directory, config_file_name=name, _from_model_config=name != _FILES[0]
        )
    except (OSError, ValueError) as error:
        raise SedacError(f"{directory / name} cannot be read; download it again") from error


def generation_note(directory: Path) -> str | None:
    """Which settings change the tokens that transformers generates, and not those of a bundle."""
    generation = read_generation(directory)
    settings = {name: getattr(generation, name, None) for name in _CHANGE_TOKENS}
    ignored = [
        f"{name} {' '.join(str(value).split())}"
        for name, value in settings.items()
        if value not in (None, [], {}, _CHANGE_TOKENS[name])
    ]
    if not ignored:
        return None
    return (
        f"of the settings for generation in {_file(directory)} only eos_token_id is read: with its"
        f" {', '.join(ignored)}, transformers generates other tokens than the bundle"
    )


def _file(directory: Path) -> str | None:
    return next((name for name in _FILES if (directory / name).exists()), None)

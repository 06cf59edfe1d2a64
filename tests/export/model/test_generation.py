"""Settings of generation_config.json that a bundle does not take are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from bad_input.command import call
from tiny_models import save_tiny_model

import sedac_export.cli
from sedac_export.model.generation import generation_note


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size 3"),
        ({"suppress_tokens": [1, 2]}, "suppress_tokens [1, 2]"),
        ({"begin_suppress_tokens": [5]}, "begin_suppress_tokens [5]"),
        ({"bad_words_ids": [[5]]}, "bad_words_ids [[5]]"),
        ({"forced_bos_token_id": 0}, "forced_bos_token_id 0"),
        ({"forced_eos_token_id": 7}, "forced_eos_token_id 7"),
        ({"min_length": 9, "num_beams": 4}, "min_length 9, num_beams 4"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size 2"),
        ({"stop_strings": ["Q:"]}, "stop_strings ['Q:']"),
        ({"watermarking_config": {"bias": 5.0}}, "watermarking_config"),
    ],
)
def test_what_changes_tokens_is_named(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    note = generation_note(tmp_path)
    assert (
        note is not None
        and f"in generation_config.json only eos_token_id is read: with its {named}" in note
    )
    assert "\n" not in note


def test_without_a_file_of_their_own_settings_are_in_the_configuration(tmp_path: Path) -> None:
    """There transformers takes them from, and from nowhere else."""
    config = {"model_type": "llama", "repetition_penalty": 1.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    note = generation_note(tmp_path)
    assert note is not None and "in config.json only" in note and "repetition_penalty 1.1" in note
    (tmp_path / "generation_config.json").write_text("{}")
    assert generation_note(tmp_path) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": 2, "pad_token_id": 0},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"repetition_penalty": 1.0, "min_length": 0, "suppress_tokens": []},
    ],
)
def test_what_changes_none_is_not(settings: dict[str, Any], tmp_path: Path) -> None:
    assert generation_note(tmp_path) is None
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert generation_note(tmp_path) is None


def test_a_build_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    save_tiny_model("qwen2", model, num_hidden_layers=1)
    (model / "generation_config.json").write_text('{"suppress_tokens": [1]}')
    arguments = ["build", "--model", str(model), "--output", str(tmp_path / "bundle")]
    result = call(sedac_export.cli.main, arguments, capfd)
    assert result.code == 0, result
    line = next(line for line in result.err.splitlines() if "eos_token_id" in line)
    assert "suppress_tokens [1]" in line

"""A bundle's tokenizer gives the ids of the one that transformers loads, or is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from sedac_export import SedacError
from sedac_export.model.tokenizer import load_tokenizer, save_tokenizer

DEMO = Path(__file__).parents[3] / "demo" / "model"
TEXT = "<|endoftext|>def f():<|endoftext|> pass"


def save_stored(directory: Path, **settings: Any) -> Path:
    """Store the demo's tokenizer with other `settings` as a bundle would; where it is."""
    model, stored = directory / "model", directory / "stored"
    model.mkdir()
    stored.mkdir()
    shutil.copy(DEMO / "tokenizer.json", model)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | settings))
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    save_tokenizer(tokenizer, stored)
    return stored


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
        {"additional_special_tokens": ["def"]},
    ],
)
def test_special_tokens_in_a_text_are_what_transformers_makes_of_them(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    stored = save_stored(tmp_path, **settings)
    expected = AutoTokenizer.from_pretrained(tmp_path / "model")(TEXT)["input_ids"]
    assert Tokenizer.from_file(str(stored / "tokenizer.json")).encode(TEXT).ids == expected


def test_a_tokenizer_that_takes_special_tokens_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SedacError, match=r"encodes .*<\|endoftext\|>.* differently"):
        save_stored(tmp_path, split_special_tokens=True)

"""Texts to quantize on."""

from pathlib import Path

import pytest
from conftest import DEMO_MODEL
from transformers import PreTrainedTokenizerFast

from sedac_export import SedacError
from sedac_export.build.texts import read_texts


@pytest.mark.parametrize(
    ("name", "reason"), [("nosuch", "No such file or directory"), (".", "Is a directory")]
)
def test_a_file_that_cannot_be_read_is_refused(
    name: str, reason: str, demo_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(SedacError) as refusal:
        read_texts(demo_tokenizer, [tmp_path / name], 64)
    expected = f"--data {tmp_path / name} cannot be read: {reason}; name a file of UTF-8 text"
    assert str(refusal.value) == expected


@pytest.fixture
def demo_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(DEMO_MODEL / "tokenizer.json"))

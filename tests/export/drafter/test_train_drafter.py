"""What a drafter is trained on: beginnings of texts, and requests about them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from sedac_export.drafter import train_drafter
from sedac_export.drafter.train_drafter import (
    LONGEST_START,
    SHORTEST_START,
    DrafterRequest,
    _starts,
    load_model,
)
from sedac_export.errors import SedacError

TEXTS = ("x" * 5, *("abcdefgh" * 100 for _ in range(9)), "y" * (SHORTEST_START - 1))


def _tokenizer(text: str) -> Any:
    """A token for each character."""
    return SimpleNamespace(input_ids=[ord(c) for c in text])


def _made(monkeypatch: pytest.MonkeyPatch, messages: int) -> list[list[int]]:
    monkeypatch.setattr(train_drafter, "request_about", lambda _, request, text: [0, *text])
    tokenizer: Any = _tokenizer
    return list(_starts(tokenizer, DrafterRequest(Path(), "model", messages, TEXTS)))


def test_every_second_beginning_is_asked_about_where_there_are_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [start[0] == 0 for start in _made(monkeypatch, messages=1)]
    assert len(asked) > 10
    assert asked == [turn % 2 == 1 for turn in range(len(asked))]
    assert not any(start[0] == 0 for start in _made(monkeypatch, messages=0))


def test_beginnings_are_of_pieces_that_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = _made(monkeypatch, messages=0)
    assert all(SHORTEST_START <= len(start) < LONGEST_START for start in starts)
    # nothing of the texts that are too short
    assert not {ord("x"), ord("y")} & {token for start in starts for token in start}
    assert starts == _made(monkeypatch, messages=0)


def test_a_model_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(SedacError, match="rope_type dynamic"):
        load_model(tmp_path, "cpu")


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SedacError, match="down_proj"):
        load_model(tmp_path, "cpu")


def test_embeddings_of_another_width_than_layers_are_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(SedacError, match="embeddings of 16 numbers and layers of 32"):
        load_model(tmp_path, "cpu")

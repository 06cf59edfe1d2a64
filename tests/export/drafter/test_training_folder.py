"""A training's folder is gone on from by the same request only."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sedac_export.drafter.training_folder import digest_of, fingerprint, open_folder
from sedac_export.errors import SedacError

WANTED = {"model": "a", "seed": 0}


def _model(**settings: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        **settings,  # type: ignore[arg-type]
    )
    return LlamaForCausalLM(config)


def test_the_same_request_goes_on(tmp_path: Path) -> None:
    for _ in range(2):
        open_folder(tmp_path / "new", WANTED, ["corpus"])
        (tmp_path / "new" / "corpus").touch()


def test_another_request_is_refused(tmp_path: Path) -> None:
    open_folder(tmp_path, WANTED, [])
    with pytest.raises(SedacError, match="--seed"):
        open_folder(tmp_path, WANTED | {"seed": 1}, [])


def test_what_no_request_is_known_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").touch()
    with pytest.raises(SedacError, match="another directory"):
        open_folder(tmp_path, WANTED, ["corpus"])
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SedacError, match="--output"):
        open_folder(file, WANTED, [])


def test_models_are_told_apart() -> None:
    model = _model()
    same = fingerprint(model)
    assert fingerprint(_model()) == same
    assert fingerprint(_model().to(torch.bfloat16)) == same
    assert fingerprint(_model(rms_norm_eps=1e-3)) != same
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(model) != same


def test_texts_are_told_apart() -> None:
    assert digest_of(["a", "bc"]) != digest_of(["ab", "c"])
    assert digest_of(["a", "bc"]) == digest_of(("a", "bc"))

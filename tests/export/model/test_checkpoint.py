"""Which files of a model directory are its weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from sedac_export import SedacError
from sedac_export.model.checkpoint import Checkpoint

WEIGHT = "model.norm.weight"


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path, num_hidden_layers=1)
    weights = load_file(tmp_path / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    save_file(weights | {WEIGHT: weights[WEIGHT] + 1}, tmp_path / shard, {"format": "pt"})
    names = dict.fromkeys(weights, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).get_parameter(WEIGHT)
    (read,) = Checkpoint.open(tmp_path).pieces(WEIGHT)
    assert torch.equal(read, weights[WEIGHT])
    assert torch.equal(read, loaded)


def test_a_weight_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    """On disk transformers looks for it where the index says, in memory the last file counts."""
    save_tiny_model("qwen2", tmp_path, num_hidden_layers=1)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    first, last = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file(weights, tmp_path / first, {"format": "pt"})
    save_file({WEIGHT: weights[WEIGHT] + 1, "last": weights[WEIGHT]}, tmp_path / last)
    index = {"weight_map": dict.fromkeys(weights, first) | {"last": last}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SedacError, match=f"{WEIGHT} twice, in {first} and in {last}"):
        Checkpoint.open(tmp_path)

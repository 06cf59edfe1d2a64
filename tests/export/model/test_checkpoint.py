"""Which files of a model directory are its weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

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

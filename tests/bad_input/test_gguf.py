"""A GGUF file is refused in one line when it is damaged, and when something in it would be lost."""

import importlib.util
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import save_tiny_gguf_model, write_gguf
from transformers import PreTrainedModel

from bad_input.command import Command, assert_one_line_error, mounted_tmpfs, snapshot

HEADER = 100_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return save_tiny_gguf_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(tiny: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file that could be built."""
    return write_gguf(tiny, tmp_path_factory.mktemp("whole") / "tiny.gguf").read_bytes()


def refuse(export: Command, file: Path, *words: str) -> None:
    before = snapshot(file.parent)
    result = export("build", "--model", file, "--output", file.parent / "new" / "bundle")
    assert_one_line_error(result, str(file), *words)
    assert snapshot(file.parent) == before


@pytest.mark.parametrize("size", [0, 3, 4, 20, 24, 1000, HEADER, -100_000, -1])
def test_cut_file_is_refused(export: Command, whole: bytes, tmp_path: Path, size: int) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(whole[:size])
    refuse(export, file, "not a usable GGUF file", "download")


def test_another_file_is_refused(export: Command, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_text("<!DOCTYPE html><title>404</title>")
    refuse(export, file, "GGUF magic", "download")


def test_file_that_is_not_there_is_refused(export: Command, tmp_path: Path) -> None:
    refuse(export, tmp_path / "tiny.gguf", "neither", ".gguf")


ODD: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "part": ({"split.count": 3}, {}, ["one of 3 parts", "llama-gguf-split"]),
    "architecture": (
        {"general.architecture": "rwkv7"},
        {},
        ["architecture rwkv7", "export the model that"],
    ),
    "encoder": ({"general.architecture": "t5"}, {}, ["t5"]),
    "depth": ({"llama.block_count": 5}, {}, ["5 layers and holds 4"]),
    "endless depth": ({"llama.block_count": 2**31}, {}, ["2147483648 layers and holds 4"]),
    "width": ({"llama.feed_forward_length": 95}, {}, ["mlp", "95"]),
    "no heads": ({"llama.attention.head_count": 0}, {}, ["zero"]),
    "scaled rope": ({"llama.rope.scaling.type": "yarn"}, {}, ["llama.rope.scaling.type yarn"]),
    "head size": ({"llama.attention.key_length": 32}, {}, ["llama.attention.key_length 32"]),
    "window": ({"llama.attention.sliding_window": 64}, {}, ["llama.attention.sliding_window 64"]),
    "rope factors": ({}, {"rope_freqs.weight": np.ones(8, np.float32)}, ["rope_freqs.weight"]),
    "bias": ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, ["blk.0.attn_q.bias"]),
    "weight gone": ({}, {"blk.2.ffn_up.weight": None}, ["model.layers.2.mlp.up_proj.weight"]),
    "layer gone": ({}, {"blk.1.attn_norm.weight": None}, ["input_layernorm"]),
    "not a number": (
        {},
        {"output_norm.weight": np.full(64, np.nan, np.float32)},
        ["model.norm.weight", "NaN"],
    ),
}


@pytest.mark.parametrize(("metadata", "tensors", "words"), ODD.values(), ids=ODD.keys())
def test_file_that_would_lose_something_is_refused(
    export: Command,
    tiny: PreTrainedModel,
    tmp_path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, Any],
    words: list[str],
) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf", metadata, tensors)
    before = snapshot(tmp_path)
    result = export("build", "--model", file, "--output", tmp_path / "new" / "bundle")
    assert_one_line_error(result, *words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("package", ["accelerate", "gguf"])
def test_missing_package_is_named(
    export: Command,
    whole: bytes,
    tmp_path: Path,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    file = tmp_path / "tiny.gguf"
    file.write_bytes(whole)
    refuse(export, file, f"package {package},", "pip install 'sedac[gguf]'")


def test_flipped_bits_end_in_one_line_or_a_bundle(
    export: Command, whole: bytes, tmp_path: Path
) -> None:
    generator = random.Random(0)
    refused = 0
    for number in range(12):
        directory = tmp_path / str(number)
        directory.mkdir()
        file = directory / "tiny.gguf"
        damaged = bytearray(whole)
        damaged[generator.randrange(2000)] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        result = export("build", "--model", file, "--output", directory / "bundle")
        if result.code == 0:
            assert sorted(directory.iterdir()) == [directory / "bundle", file]
        else:
            assert_one_line_error(result)
            assert list(directory.iterdir()) == [file]
            refused += 1
    assert refused > 0


def test_full_disk_is_named(export: Command, whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(whole)
    with mounted_tmpfs(tmp_path / "disk", "size=400k") as disk:
        result = export("build", "--model", file, "--output", disk / "bundle")
        assert_one_line_error(result, str(disk / "bundle"), "cannot be written", "No space left")
        assert not list(disk.iterdir())


def test_tensors_that_overlap_are_refused(export: Command, whole: bytes, tmp_path: Path) -> None:
    name = b"blk.0.ffn_up.weight"
    damaged = bytearray(whole)
    # behind the name: 4 bytes of rank, two dimensions of 8, 4 of type
    offset = damaged.index(name) + len(name) + 4 + 16 + 4
    damaged[offset : offset + 8] = struct.pack("<Q", 0)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(damaged)
    refuse(export, file, "blk.0.ffn_up.weight is at 0")

"""A bundle built from a GGUF file gives what transformers gives from that file."""

from pathlib import Path

import pytest
import torch
from conftest import THREADS
from eager import assert_decoded
from gguf_files import CHAT_TEMPLATE, save_tiny_gguf_model, write_gguf
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from sedac_export import BuildRequest, build_bundle
from sedac_export.bundle.manifest import read_manifest
from sedac_export.model.gguf_file import convert, tokenizer_note
from sedac_export.model.tokenizer import save_tokenizer
from sedac_runtime import SedacModel

TEXT = "def f(x, y=2024):\n    return x  # Grüße, it's 你好 🙂\n"


def reference(file: Path) -> PreTrainedModel:
    """What transformers makes of `file`."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    random = save_tiny_gguf_model("llama", tmp_path / "model")
    file = write_gguf(random, tmp_path / "files" / "tiny-Q8_0.gguf")
    output = tmp_path / "bundles" / "tiny"
    build_bundle(BuildRequest(str(file), output))
    assert list(output.parent.iterdir()) == [output]
    assert read_manifest(output).model.name == "tiny-Q8_0"
    assert (output / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    model = SedacModel.from_pretrained(output, threads=THREADS)
    prompt = model.encode(TEXT)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert prompt == tokenizer(TEXT)["input_ids"]
    chat = [{"role": "user", "content": "Why?"}]
    assert model.encode_chat(chat) == tokenizer.apply_chat_template(chat)["input_ids"]
    tokens = model.generate(prompt, mode="full", max_new_tokens=64, stop_tokens=[]).tokens
    assert len(tokens) == 64
    assert_decoded(reference(file), prompt, tokens)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_nothing_changes_on_the_way(name: str, tmp_path: Path) -> None:
    random = save_tiny_gguf_model(name, tmp_path / "model")
    file = write_gguf(random, tmp_path / "tiny.gguf")
    (tmp_path / "converted").mkdir()
    tokenizer = convert(file, tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").state_dict()
    expected = reference(file).state_dict()
    assert converted.keys() == expected.keys()
    for weight, value in expected.items():
        assert torch.equal(converted[weight], value)
        # and it is the model that the file was made from, rounded
        assert torch.allclose(value, random.state_dict()[weight], atol=0.02)
    assert tokenizer is not None
    direct = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    save_tokenizer(tokenizer, tmp_path)
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert stored.encode(TEXT).ids == direct(TEXT)["input_ids"]


def test_files_beside_it_do_not_matter(tmp_path: Path) -> None:
    random = save_tiny_gguf_model("llama", tmp_path / "model")
    file = write_gguf(random, tmp_path / "files" / "tiny.gguf")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    alone = convert(file, tmp_path / "a")
    other = Tokenizer(models.WordLevel({"x": 0, "?": 1}, unk_token="?"))
    other.save(str(file.with_name("tokenizer.json")))
    file.with_name("config.json").write_text("{")
    file.with_name("tokenizer_config.json").write_text('{"chat_template": "other"}')
    beside = convert(file, tmp_path / "b")
    assert alone is not None
    assert beside is not None
    assert beside(TEXT)["input_ids"] == alone(TEXT)["input_ids"]
    assert beside.chat_template == alone.chat_template == CHAT_TEMPLATE


def test_a_tokenizer_that_transformers_does_not_know_is_noted(tmp_path: Path) -> None:
    random = save_tiny_gguf_model("llama", tmp_path / "model")
    assert tokenizer_note(write_gguf(random, tmp_path / "known.gguf")) is None
    file = write_gguf(random, tmp_path / "other.gguf", {"tokenizer.ggml.pre": "smollm"})
    assert "smollm" in (tokenizer_note(file) or "")

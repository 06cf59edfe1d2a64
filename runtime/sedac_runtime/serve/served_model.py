"""A bundle that is served: its model, its engine thread, and what is known of its texts."""

import json
import time
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer

from sedac_runtime import _core
from sedac_runtime._core import DecodingSetting, InputError, Sampling, TextStream
from sedac_runtime.chat import Message
from sedac_runtime.model import SedacModel
from sedac_runtime.serve.constraint import Constraint
from sedac_runtime.serve.engine_thread import EngineThread
from sedac_runtime.serve.response_bodies import ModelEntry, SedacModelFacts
from sedac_runtime.serve.tool_format import ToolFormat, tool_format

_TOKENIZER = "tokenizer.json"
_EXIT_CONFIG = "sedac_config.json"


class ServedModel:
    """A bundle under the name that requests give."""

    def __init__(self, name: str, model: SedacModel, engine: EngineThread) -> None:
        self.name = name
        self.engine = engine
        self.core = model.core
        self._model = model
        self._created = int(time.time())
        # now: whoever edits a bundle puts another in its place
        self._tokenizer_text = model.core.read_text(_TOKENIZER)

    def start(self) -> None:
        """Begin to generate, and have ready what renders chats."""
        self.engine.start()
        self._model.chat_templates.start()

    @cached_property
    def vocabulary_size(self) -> int:
        """Tokens that the model has logits for."""
        manifest = json.loads(_core.read_manifest(self._model.bundle))
        size: int = manifest["model"]["vocab_size"]
        return size

    @cached_property
    def entry(self) -> ModelEntry:
        """The model's entry in /v1/models."""
        core = self.core
        facts = SedacModelFacts(
            num_layers=core.num_layers,
            max_cache_length=core.max_cache_length,
            exit_layers=core.exit_layers,
            policy=self._exit_config().get("policy", "stability"),
            backend=core.backend,
            device=core.device,
            chat=self._template is not None,
            certification=self.certification(self.core.decoding("lossless"), Sampling()),
        )
        return ModelEntry(id=self.name, created=self._created, sedac=facts)

    def certification(self, decoding: DecodingSetting, sampling: Sampling) -> str | None:
        """What is certified of texts that are decoded so; None where they are full depth's."""
        certification = self.core.certification(decoding, sampling)
        return None if certification is None else str(certification)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes tool calls; None where its template has none that is known."""
        return None if self._template is None else tool_format(self._template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return self._model.encode(text)

    def encode_chat(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """Token ids of a chat."""
        return self._model.encode_chat(messages, tools)

    def decode(self, tokens: list[int]) -> str:
        """The text of a prompt's tokens."""
        return self.core.decode(tokens)

    def text_stream(self) -> TextStream:
        """Decodes one sequence."""
        return self.core.text_stream()

    def constraint(self, grammar: str) -> Constraint:
        """A grammar in the tokens of this model."""
        return Constraint(self._tokenizer, grammar)

    def token_bytes(self, token: int) -> bytes:
        """What `token` contributes to a text, which may be a part of a character."""
        return self._tokenizer.decode_bytes([token])

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        text = self._tokenizer_text
        if text is None:
            raise InputError(f"{self.name} has no tokenizer; build its bundle with one")
        return LLTokenizer(text, n_vocab=self.vocabulary_size, eos_token=self.core.eos_token_ids)

    @cached_property
    def _template(self) -> str | None:
        try:
            template, _ = self._model.chat_templates.read(with_tools=True)
        except InputError:
            return None
        return template

    def _exit_config(self) -> dict[str, Any]:
        path = self._model.bundle / _EXIT_CONFIG
        return json.loads(path.read_text()) if path.is_file() else {}

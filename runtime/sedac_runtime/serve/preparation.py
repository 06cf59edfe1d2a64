"""From a request to the sequences that the scheduler runs."""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sedac_runtime import _core
from sedac_runtime._core import InputError
from sedac_runtime.serve.api_errors import bad_request
from sedac_runtime.serve.chat_request import ChatMessage, ChatRequest, FunctionDefinition
from sedac_runtime.serve.constraint import json_grammar, lark_grammar
from sedac_runtime.serve.echo import Prompt
from sedac_runtime.serve.engine_thread import SequenceRequest
from sedac_runtime.serve.request_fields import (
    CompletionRequest,
    GenerationRequest,
    ResponseFormat,
    SedacOptions,
)
from sedac_runtime.serve.served_model import ServedModel

T = TypeVar("T")

# OpenAI's default for /v1/completions
_COMPLETION_TOKENS = 16
# seeds are counted modulo this
_SEEDS = 2**64


@dataclass(frozen=True)
class Work:
    """What a request asks of a model. sequences: n for each of the prompts, in turn."""

    prompts: list[Prompt]
    sequences: list[SequenceRequest]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)


def count_choices(request: GenerationRequest) -> int:
    """Choices of the response."""
    prompts = len(_listed(request)) if isinstance(request, CompletionRequest) else 1
    return prompts * (request.n or 1)


def prepare_completion(model: ServedModel, request: CompletionRequest) -> Work:
    """Tokenize, and resolve every setting. Raises ApiError."""
    if request.best_of not in (None, request.n or 1):
        raise bad_request("best_of is supported only where it equals n; leave it out", "best_of")
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens 0 needs echo: true; give 1 or more", "max_tokens")
    prompts = [_prompt(model, prompt, request) for prompt in _listed(request)]
    if not prompts:
        raise bad_request("prompt is empty; give at least one", "prompt")
    limit = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    return _work(model, request, prompts, "prompt", limit, request.logprobs, None)


def prepare_chat(model: ServedModel, request: ChatRequest) -> Work:
    """Render the chat template, tokenize, and resolve every setting. Raises ApiError."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    grammar = _grammar(model, request)
    tools = None
    if request.functions:
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    messages = [_template_message(message) for message in request.messages]
    tokens = _checked("messages", lambda: model.encode_chat(messages, tools))
    limit = request.max_completion_tokens or request.max_tokens or model.core.max_cache_length
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _work(model, request, [Prompt(tokens)], "messages", limit, logprobs, grammar)


def _work(
    model: ServedModel,
    request: GenerationRequest,
    prompts: list[Prompt],
    field: str,
    limit: int,
    logprobs: int | None,
    grammar: str | None,
) -> Work:
    decoding = _decoding(model, request.sedac or SedacOptions())
    constraint = None
    if grammar is not None:
        constraint = _checked("response_format", lambda: model.constraint(grammar))
    bias = _logit_bias(model, request)
    sequences = []
    for prompt in prompts:
        room = _room(model, prompt, field, limit)
        first_seed = secrets.randbits(64) if request.seed is None else request.seed
        for index in range(request.n or 1):
            sequence = SequenceRequest(
                prompt=prompt.tokens,
                decoding=decoding,
                sampling=_sampling(request, (first_seed + index) % _SEEDS),
                # the logits that score a prompt give a first token, wanted or not
                max_new_tokens=max(1, min(limit, room)),
                stop_tokens=model.core.eos_token_ids,
                top_logprobs=logprobs,
                prompt_logprobs=prompt.is_scored,
                logit_bias=bias,
                constraint=constraint and constraint.fork(),
            )
            sequences.append(sequence)
    return Work(prompts, sequences)


def _listed(request: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts of a request, of which there may be one or several."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return prompt  # type: ignore[return-value]


def _prompt(model: ServedModel, prompt: str | list[int], request: CompletionRequest) -> Prompt:
    echo = bool(request.echo)
    is_scored = echo and request.logprobs is not None
    if isinstance(prompt, str):
        tokens = _checked("prompt", lambda: model.encode(prompt))
        return Prompt(tokens, prompt if echo else "", is_scored)
    if not model.core.has_tokenizer:
        raise bad_request(
            f"{model.name} has no tokenizer, which its answers need; build its bundle with one",
            "prompt",
        )
    for token in prompt:
        if not 0 <= token < model.vocabulary_size:
            raise bad_request(
                f"token {token} is out of range: 0 to {model.vocabulary_size - 1}", "prompt"
            )
    return Prompt(prompt, model.decode(prompt) if echo else "", is_scored)


def _room(model: ServedModel, prompt: Prompt, field: str, limit: int) -> int:
    """Tokens that fit after `prompt`, at least one where any are wanted."""
    length = len(prompt.tokens)
    longest = min(model.core.max_cache_length, model.engine.cache_tokens)
    if length == 0:
        raise bad_request(f"{field} has no tokens; give some text", field)
    if length > longest:
        raise bad_request(
            f"{field} has {length} tokens and this model takes at most {longest}; shorten it",
            field,
            "context_length_exceeded",
        )
    # the last token is not run, so it needs no position
    return longest - length + 1


def _decoding(model: ServedModel, options: SedacOptions) -> _core.DecodingSetting:
    def resolve() -> _core.DecodingSetting:
        return model.core.decoding(
            options.mode,
            policy=options.policy,
            threshold=options.threshold,
            tau=options.tau,
            consecutive_k=options.consecutive_k,
            min_layer_ratio=options.min_layer_ratio,
            kv_fill=options.kv_fill,
            drafter=options.drafter,
        )

    return _checked("sedac", resolve)


def _sampling(request: GenerationRequest, seed: int) -> _core.Sampling:
    options = request.sedac or SedacOptions()
    return _core.Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=options.top_k,
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=seed,
    )


def _logit_bias(model: ServedModel, request: GenerationRequest) -> dict[int, float] | None:
    bias = {}
    for name, value in (request.logit_bias or {}).items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
        if not 0 <= token < model.vocabulary_size:
            raise bad_request(
                f"logit_bias has {name[:20]!r}, which is no token: 0 to"
                f" {model.vocabulary_size - 1}",
                "logit_bias",
            )
        bias[token] = value
    return bias or None


def _grammar(model: ServedModel, request: ChatRequest) -> str | None:
    """What the text has to follow: a tool call that is asked for, or the response format, beside
    which tools may still be called."""
    required = _required_functions(request)
    if request.functions and model.tool_format is None:
        raise bad_request(
            "the chat template of this model has no tool calls that this server knows; leave tools"
            " out",
            "tools",
        )
    answer = _format_schema(request.response_format)
    grammar = None
    if answer is not None:
        grammar = _checked("response_format", lambda: json_grammar(answer))
    family = model.tool_format if request.functions else None
    if family is None or not (required or answer is not None):
        return grammar

    def lark() -> str:
        return family.grammar(required) if required else family.grammar(request.functions, answer)

    return _checked("tools", lambda: lark_grammar(lark()))


def _required_functions(request: ChatRequest) -> list[FunctionDefinition]:
    """The functions of which one must be called."""
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return []
    functions = request.functions
    if not isinstance(choice, str) and choice is not None:
        functions = [known for known in functions if known.name == choice.function.name]
    if not functions:
        raise bad_request("tool_choice asks for a tool that tools does not have", "tool_choice")
    return functions


def _format_schema(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """What an answer conforms to."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return {"type": "object"}
    schema = response_format.json_schema
    if schema is None:
        raise bad_request(
            "response_format.json_schema is missing",
            "response_format",
            "missing_required_parameter",
        )
    return schema.schema_


def _template_message(message: ChatMessage) -> dict[str, object]:
    """A message as chat templates expect it: content is text, arguments are objects."""
    rendered = message.model_dump(exclude_none=True, exclude={"annotations"})
    content = message.content or ""
    parts = content if isinstance(content, str) else "".join(part.text for part in content)
    rendered["content"] = parts
    if message.role == "developer":
        rendered["role"] = "system"
    for call in rendered.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return rendered


def _arguments(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _checked(param: str, make: Callable[[], T]) -> T:
    """What `make` returns; what it refuses is a 400 about field `param`."""
    try:
        return make()
    except InputError as error:
        raise bad_request(str(error), param) from error
    except UnicodeEncodeError as error:
        raise bad_request(f"{param} has half a character (a lone surrogate)", param) from error

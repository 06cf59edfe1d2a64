"""The bodies of responses."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

T = TypeVar("T")
# a field that a response lacks where it is None; other fields are null
Absent = Annotated[T | None, Field(exclude_if=lambda value: value is None)]

ChoiceFinish = Literal["stop", "length", "tool_calls"]


class CachedTokens(BaseModel):
    """cached_tokens: tokens whose KV cache came from an earlier request."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class SedacToken(BaseModel):
    """text: what the token completes. exit_layer: layers executed. drafted: whether it was drafted,
    and accepted."""

    id: int
    text: str
    exit_layer: int
    exit_reason: str
    drafted: bool


class SedacSummary(BaseModel):
    """How a finished choice was decoded; see `sedac_runtime.GenerationOutput`. certification:
    absent where all tokens are full depth's."""

    mode: str
    drafter: str
    kv_fill: str
    num_layers: int
    mean_exit_layer: float
    drafted: int
    accepted: int
    verify_passes: int
    certification: Absent[str] = None


class SedacChoice(BaseModel):
    """Present where the request has `sedac`. summary: once the choice is finished."""

    tokens: list[SedacToken]
    summary: Absent[SedacSummary] = None


class TopLogprob(BaseModel):
    """A token that was probable."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the text, and the most probable tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message."""

    content: list[TokenLogprob]


class CompletionLogprobs(BaseModel):
    """One entry for each token, with echo also of the prompt, whose first one has null for its log
    probabilities; text_offset counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A completion, or in a stream what it continues with."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: ChoiceFinish | None = None
    sedac: Absent[SedacChoice] = None


class Completion(BaseModel):
    """The response of /v1/completions; streams consist of these too."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Absent[Usage] = None


class CalledFunction(BaseModel):
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class MadeToolCall(BaseModel):
    """A call that the model makes. index: in streams."""

    index: Absent[int] = None
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: Absent[list[MadeToolCall]] = None


class MessageDelta(BaseModel):
    """What a message continues with."""

    role: Absent[Literal["assistant"]] = None
    content: Absent[str] = None
    tool_calls: Absent[list[MadeToolCall]] = None


class ChatChoice(BaseModel):
    """A message of the model."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChoiceFinish
    sedac: Absent[SedacChoice] = None


class ChatCompletion(BaseModel):
    """The response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """What a choice continues with."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChoiceFinish | None = None
    sedac: Absent[SedacChoice] = None


class ChatChunk(BaseModel):
    """An event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Absent[Usage] = None


class SedacModelFacts(BaseModel):
    """What a client can choose from. certification: why lossless mode, the default, is not exact on
    this CPU; null where it is."""

    num_layers: int
    max_cache_length: int
    exit_layers: list[int]
    policy: str
    backend: str
    device: str
    chat: bool
    certification: str | None


class ModelEntry(BaseModel):
    """A bundle that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sedac"
    sedac: SedacModelFacts


class ModelList(BaseModel):
    """The response of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]

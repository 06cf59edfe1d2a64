"""The body of /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import Field

from sedac_runtime.serve.request_fields import (
    MOST_TOKENS,
    GenerationRequest,
    Ignored,
    RequestModel,
    ResponseFormat,
    only,
)


class TextPart(RequestModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(RequestModel):
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(RequestModel):
    """A call that the model made earlier."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(RequestModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Ignored = None


class FunctionDefinition(RequestModel):
    """parameters: the JSON schema of the arguments."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestModel):
    """The name of a function."""

    name: str


class NamedTool(RequestModel):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MOST_TOKENS)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[str] | None, *only(["text"])] = None
    service_tier: Annotated[str | None, *only("auto", "default")] = None
    store: Annotated[bool | None, *only(False)] = None
    metadata: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    @property
    def functions(self) -> list[FunctionDefinition]:
        """What the model may call."""
        return [] if self.tool_choice == "none" else [tool.function for tool in self.tools or ()]

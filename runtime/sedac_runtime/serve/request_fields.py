"""The fields that both completion endpoints take."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict, JsonValue
from pydantic.fields import FieldInfo

from sedac_runtime.choices import Drafter, KvFill, Mode, PolicyName

MOST_CHOICES = 128
MOST_STOPS = 16
MOST_TOKENS = 2**31 - 1


class RequestModel(BaseModel):
    """An object in a request: exact types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def only(*allowed: JsonValue) -> tuple[AfterValidator, FieldInfo]:
    """Accept a field that clients send, where it asks for nothing that is not supported."""

    def check(value: object) -> object:
        if value is not None and value not in allowed:
            names = " or ".join(map(repr, allowed)) or "null"
            raise ValueError(f"only {names} is supported")
        return value

    schema: JsonDict = {"enum": [*allowed, None]}
    return AfterValidator(check), Field(json_schema_extra=schema)


Zero = Annotated[float | None, *only(0)]
Ignored = Annotated[Any, Field(description="Accepted and ignored.")]
StopString = Annotated[str, Field(min_length=1)]
LogitBias = Annotated[float, Field(ge=-100, le=100)]


class SedacOptions(RequestModel):
    """Decoding settings that OpenAI's API lacks, by the names of `sedac-runtime generate`.

    Where this object is given, even empty, choices of the response have one of their own.
    """

    mode: Mode = "lossless"
    policy: PolicyName | None = None
    threshold: float | None = None
    tau: float | None = None
    consecutive_k: Annotated[int | None, Field(ge=1, le=MOST_TOKENS)] = None
    min_layer_ratio: float | None = None
    kv_fill: KvFill | None = None
    drafter: Drafter | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=3.4e38)] = 1.0


class StreamOptions(RequestModel):
    """include_usage: send the usage in a last chunk, which has no choices."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class GenerationRequest(RequestModel):
    """The fields that both completion endpoints take. null stands for the default."""

    model: str
    n: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=MOST_TOKENS)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS)] | None = None
    logit_bias: dict[str, LogitBias] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sedac: SedacOptions | None = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    user: Ignored = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int | None, Field(ge=0, le=MOST_TOKENS)] = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    best_of: int | None = None
    suffix: Annotated[str | None, *only("")] = None


class ResponseFormatSchema(RequestModel):
    """A named JSON schema."""

    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """What the text must be. json_schema: with type "json_schema" only."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: ResponseFormatSchema | None = None

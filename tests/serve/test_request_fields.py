"""What is accepted of a request, and how a refusal names its field."""

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from sedac_runtime.serve.api_errors import ErrorDetail, invalid_request
from sedac_runtime.serve.chat_request import ChatRequest
from sedac_runtime.serve.request_fields import CompletionRequest

COMPLETION = {"model": "m", "prompt": "a"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
MODELS: dict[type[BaseModel], dict[str, Any]] = {CompletionRequest: COMPLETION, ChatRequest: CHAT}


def refusal(model: type[BaseModel], body: Any) -> ErrorDetail | None:
    """The error that FastAPI's exception for `body` becomes."""
    try:
        model.model_validate(body)
    except ValidationError as error:
        errors = [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors()]
        answer = invalid_request(RequestValidationError(errors, body=body))
        assert answer.status_code == 400
        return answer.body.error
    return None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", None),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("n", "1"),
        ("n", 1.5),
        ("max_tokens", -1),
        ("max_tokens", 2**31),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("seed", 1.5),
        ("seed", "1"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", [1]),
        ("logit_bias", {"1": 101}),
        ("logit_bias", []),
        ("stream", "yes"),
        ("stream_options", {"other": True}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("sedac", {"mode": "fast"}),
        ("sedac", {"drafter": "big"}),
        ("sedac", {"unknown": 1}),
        ("sedac", {"top_k": -1}),
        ("sedac", []),
    ],
)
def test_values_out_of_range_name_their_field(
    model: type[BaseModel], field: str, value: Any
) -> None:
    detail = refusal(model, MODELS[model] | {field: value})
    assert detail is not None
    assert detail.type == "invalid_request_error"
    assert (detail.param or "").startswith(field)
    assert len(detail.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (CompletionRequest, {"model": "m"}, "prompt"),
        (CompletionRequest, COMPLETION | {"prompt": None}, "prompt"),
        (CompletionRequest, COMPLETION | {"prompt": {}}, "prompt"),
        (CompletionRequest, COMPLETION | {"prompt": ["a", 1]}, "prompt[1]"),
        (CompletionRequest, COMPLETION | {"suffix": "b"}, "suffix"),
        (CompletionRequest, COMPLETION | {"logprobs": 21}, "logprobs"),
        (ChatRequest, {"model": "m", "messages": []}, "messages"),
        (ChatRequest, {"model": "m"}, "messages"),
        (
            ChatRequest,
            CHAT | {"messages": [{"role": "user"}, {"content": "a"}]},
            "messages[1].role",
        ),
        (ChatRequest, CHAT | {"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
        (
            ChatRequest,
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        (ChatRequest, CHAT | {"top_logprobs": 21}, "top_logprobs"),
        (ChatRequest, CHAT | {"response_format": {"type": "xml"}}, "response_format.type"),
        (ChatRequest, CHAT | {"tools": [{"type": "search"}]}, "tools[0].type"),
        (ChatRequest, CHAT | {"tool_choice": "maybe"}, "tool_choice"),
        (ChatRequest, CHAT | {"tool_choice": {"type": "function"}}, "tool_choice.function"),
        (ChatRequest, CHAT | {"modalities": ["audio"]}, "modalities"),
        (ChatRequest, CHAT | {"store": True}, "store"),
        (ChatRequest, CHAT | {"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_refusals_name_the_place(model: type[BaseModel], body: Any, param: str) -> None:
    detail = refusal(model, body)
    assert detail is not None
    assert detail.param == param


def test_too_many_stop_strings_are_called_that() -> None:
    """Not that they are no text, which is the other form of the field."""
    detail = refusal(CompletionRequest, COMPLETION | {"stop": ["a"] * 17})
    assert detail is not None
    assert detail.message == "stop: List should have at most 16 items after validation, not 17"


def test_a_field_that_is_not_supported_is_called_that() -> None:
    detail = refusal(ChatRequest, CHAT | {"audio": {}})
    assert detail is not None
    assert detail.message == "audio is not supported; leave it out"
    assert detail.code == "unknown_parameter"


@pytest.mark.parametrize("model", MODELS)
def test_what_asks_for_nothing_is_accepted(model: type[BaseModel]) -> None:
    nulls = dict.fromkeys(("n", "stop", "seed", "top_p", "stream", "sedac", "logit_bias", "user"))
    penalties = {"presence_penalty": 0, "frequency_penalty": 0.0}
    assert refusal(model, MODELS[model] | nulls | penalties) is None


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@pytest.mark.parametrize("model", MODELS)
@given(data=st.data())
def test_any_value_is_accepted_or_refused_by_field(
    model: type[BaseModel], data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(model.model_fields)) | st.text(min_size=1)
    name = data.draw(names)
    detail = refusal(model, MODELS[model] | {name: data.draw(values)})
    if detail is not None:
        assert detail.param is not None
        assert detail.param.startswith(name)
        json.dumps(detail.model_dump())


@given(values)
def test_bodies_that_are_no_requests_are_refused(body: Any) -> None:
    for model in MODELS:
        assert refusal(model, body) is not None

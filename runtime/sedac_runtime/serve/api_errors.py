"""Errors as OpenAI's API words them."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException


class ErrorDetail(BaseModel):
    """message: one line. param: the field of the request that is to be changed."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error response. It is an HTTPException so that FastAPI passes it on while it reads a
    request's body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.body = ErrorBody(error=ErrorDetail(message=message, type=type, param=param, code=code))

    def response(self) -> JSONResponse:
        """The response that tells the client."""
        return JSONResponse(self.body.model_dump(), self.status_code, self.headers)


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    """400: field `param` of the request cannot be used."""
    return ApiError(400, message, param=param, code=code)


def server_busy() -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429,
        "the queue of this model is full; retry later",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def too_many_connections(limit: int) -> ApiError:
    """503: more clients are connected than the server allows."""
    return ApiError(
        503,
        f"more than {limit} connections are open; close idle ones or retry later",
        type="server_error",
        code="too_many_connections",
        headers={"Retry-After": "1", "Connection": "close"},
    )


def timed_out(seconds: float) -> ApiError:
    """408: the request took longer than the server allows."""
    return ApiError(
        408,
        f"the request took longer than {seconds:g} s; ask for fewer tokens or retry later",
        type="timeout_error",
        code="request_timeout",
    )


def engine_failed(reason: str) -> ApiError:
    """503: the engines of this model no longer run."""
    return ApiError(
        503,
        f"the engines of this model have failed ({reason}); restart the server",
        type="server_error",
        code="engine_failed",
    )


def failure() -> ApiError:
    """500: what nobody expected."""
    return ApiError(500, "the server failed; its log has the reason", type="server_error")


def client_gone() -> ApiError:
    """499, which nobody reads but the log."""
    return ApiError(499, "the client has gone")


def invalid_request(error: RequestValidationError) -> ApiError:
    """400: something in the body that does not match the schema.

    Of the alternatives of a union all report what they lack: the deepest place is the one that
    the client meant, and of equally deep ones what is of the right type.
    """
    errors = error.errors()
    outermost = errors[0]
    if outermost["loc"][:1] != ("body",) or outermost["type"] == "json_invalid":
        return bad_request("the body is not JSON; send a JSON object", None)
    if outermost["loc"] == ("body",) and outermost["type"] != "missing":
        return bad_request(
            "the body is not a JSON object; send one, with Content-Type: application/json", None
        )
    places = [
        field_path(entry["loc"][1:], error.body, missing=entry["type"] == "missing")
        for entry in errors
    ]
    meant = [
        (len(place), not entry["type"].endswith("_type"))
        for place, entry in zip(places, errors, strict=True)
    ]
    deepest = meant.index(max(meant))
    param, kind = ".".join(places[deepest]).replace(".[", "[") or None, errors[deepest]["type"]
    if kind == "extra_forbidden":
        return bad_request(f"{param} is not supported; leave it out", param, "unknown_parameter")
    if kind == "missing":
        name = param or "the body"
        return bad_request(f"{name} is missing", param, "missing_required_parameter")
    return bad_request(f"{param or 'the body'}: {errors[deepest]['msg']}", param, "invalid_value")


def field_path(location: Sequence[int | str], body: Any, *, missing: bool) -> list[str]:
    """The parts of `location` as a client would write it, such as messages, [0], content.

    pydantic also names the alternatives of a union in a location: what is not in `body` is left
    out, but for the last part, if that is what is missing.
    """
    path, value = [], body
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(value, dict) and (part in value or (missing and last)):
            path.append(str(part))
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(f"[{part}]")
            value = value[part]
    return path


async def respond_to_api_error(_: Request, error: Exception) -> JSONResponse:
    """For FastAPI's table of exception handlers."""
    assert isinstance(error, ApiError)
    return error.response()


async def respond_to_invalid_request(_: Request, error: Exception) -> JSONResponse:
    """For FastAPI's table of exception handlers."""
    assert isinstance(error, RequestValidationError)
    return invalid_request(error).response()


async def respond_to_http_error(_: Request, error: Exception) -> JSONResponse:
    """For FastAPI's table of exception handlers: unknown paths and methods."""
    assert isinstance(error, StarletteHTTPException)
    return ApiError(error.status_code, error.detail, headers=error.headers).response()

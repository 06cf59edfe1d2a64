"""What the routes have in common."""

import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request

from sedac_runtime.serve.api_errors import ApiError, ErrorBody
from sedac_runtime.serve.preparation import Work, count_choices
from sedac_runtime.serve.request_fields import GenerationRequest
from sedac_runtime.serve.responses import Exchange
from sedac_runtime.serve.served_model import ServedModel

Body = TypeVar("Body", bound=GenerationRequest)

# for the OpenAPI schema
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "A field cannot be used, or is not supported."},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong."},
    404: {"model": ErrorBody, "description": "There is no such model."},
    408: {"model": ErrorBody, "description": "The request took too long."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    429: {"model": ErrorBody, "description": "The queue is full; Retry-After says when to retry."},
    500: {"model": ErrorBody, "description": "The generation failed."},
    503: {"model": ErrorBody, "description": "The engines have failed."},
}


# of endpoints that may stream
ANSWERS = ERRORS | {
    200: {
        "content": {"text/event-stream": {}},
        "description": "The whole response, or with stream: true server-sent events.",
    }
}


def served_model(request: Request, name: str) -> ServedModel:
    """The model called `name`. Raises ApiError."""
    models: dict[str, ServedModel] = request.app.state.models
    if name not in models:
        known = ", ".join(models)
        raise ApiError(
            404,
            f"there is no model {name[:80]!r}; this server has {known}",
            param="model",
            code="model_not_found",
        )
    return models[name]


def begin(request: Request, body: Body, prepare: Callable[[ServedModel, Body], Work]) -> Exchange:
    """The exchange that answers `request`. Raises ApiError."""
    model = served_model(request, body.model)
    log: dict[str, Any] = request.state.log
    log["model"] = model.name
    settings = request.app.state.settings
    return Exchange(model, body, count_choices(body), lambda: prepare(model, body), settings, log)


def new_id(prefix: str) -> str:
    """An identifier of a response."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())

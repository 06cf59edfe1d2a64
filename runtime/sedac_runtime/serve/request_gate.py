"""What happens to every request before and after the routes: its id, log line and metrics, the API
key, and the limit of its body."""

import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sedac_runtime.serve import tracing
from sedac_runtime.serve.api_errors import ApiError, failure, too_many_connections
from sedac_runtime.serve.json_logs import request_id, trace_id
from sedac_runtime.serve.server_metrics import ServerMetrics
from sedac_runtime.serve.server_settings import ServerSettings

_LOG = logging.getLogger(__name__)
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_HEADER = "x-request-id"
# what logs call the status of a request without a response
_CLIENT_GONE = 499


class RequestRecord:
    """Gives each request an id, and records how it ended."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(_HEADER, "")
        own = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        request_id.set(own)
        span = tracing.current_span()
        trace_id.set(None if span is None else tracing.trace_id(span))
        log: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = log
        status, begun = _CLIENT_GONE, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_HEADER] = own
            elif span is not None and not message.get("more_body", False):
                # the span ends with the body
                tracing.describe(span, scope["path"], own, log)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _LOG.exception("the server failed")
            if status == _CLIENT_GONE:  # no response has begun
                await failure().response()(scope, receive, send_with_id)
        finally:
            if span is not None and span.is_recording():
                tracing.describe(span, scope["path"], own, log)
            self._record(scope, status, time.perf_counter() - begun, log)

    def _record(self, scope: Scope, status: int, seconds: float, log: dict[str, Any]) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "unknown")
        self._metrics.requests.labels(path, status).inc()
        self._metrics.request_seconds.labels(path).observe(seconds)
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "duration_ms": round(seconds * 1e3, 1),
            **log,
        }
        _LOG.info("request", extra={"fields": fields})


class RequestGate:
    """Refuses requests to /v1 without the key, bodies over the limit, and every request while too
    many connections are open: those in the application's state."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._key = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()
        self._max_body = settings.max_body
        self._max_connections = settings.max_connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        connections = len(scope["app"].state.connections)
        refusal = self._refusal(scope["path"], headers, connections)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise self._too_large()
            return message

        await self._app(scope, receive_within_limit, send)

    def _refusal(self, path: str, headers: Headers, connections: int) -> ApiError | None:
        if connections > self._max_connections:
            return too_many_connections(self._max_connections)
        if self._key is not None and path.startswith("/v1/"):
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, self._key):
                return ApiError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_body} bytes; send a shorter one",
            code="body_too_large",
        )

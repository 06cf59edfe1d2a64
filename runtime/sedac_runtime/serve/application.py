"""The server as an ASGI application."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from sedac_runtime.serve import api_errors, chat_routes, completion_routes, tracing
from sedac_runtime.serve.request_gate import RequestGate, RequestRecord
from sedac_runtime.serve.response_bodies import ModelEntry, ModelList
from sedac_runtime.serve.routing import ERRORS, served_model
from sedac_runtime.serve.served_model import ServedModel
from sedac_runtime.serve.server_metrics import ServerMetrics
from sedac_runtime.serve.server_settings import ServerSettings

_LOG = logging.getLogger(__name__)

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Without FastAPI's own answer to a body that does not fit: here that is status 400."""
        schema = super().openapi()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema


def create_application(
    models: Sequence[ServedModel], metrics: ServerMetrics, settings: ServerSettings
) -> FastAPI:
    """The application that serves `models`. Its lifespan starts and stops their threads. Raises
    InputError where traces are asked for that cannot be."""
    app = _Application(
        title="sedac-runtime",
        version=version("sedac-runtime"),
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        lifespan=_run_engines,
        exception_handlers={
            api_errors.ApiError: api_errors.respond_to_api_error,
            RequestValidationError: api_errors.respond_to_invalid_request,
            StarletteHTTPException: api_errors.respond_to_http_error,
        },
    )
    app.state.models = {model.name: model for model in models}
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.connections = frozenset()  # a server that counts them puts its own here
    app.add_middleware(RequestGate, settings=settings)
    app.add_middleware(RequestRecord, metrics=metrics)
    app.include_router(completion_routes.router)
    app.include_router(chat_routes.router)
    app.get("/v1/models", responses=ERRORS)(list_models)
    app.get("/v1/models/{name:path}", responses=ERRORS)(get_model)
    app.get("/health", responses=ERRORS)(health)
    app.get("/ready", responses=ERRORS)(health)
    app.get("/metrics", response_class=Response)(show_metrics)
    for path in _PAGE:
        app.get(path, include_in_schema=False)(show_page)
    tracing.instrument(app)
    return app


@asynccontextmanager
async def _run_engines(app: FastAPI) -> AsyncIterator[None]:
    for model in app.state.models.values():
        if (certification := model.entry.sedac.certification) is not None:
            _LOG.warning(certification, extra={"fields": {"model": model.name}})
        model.start()
    yield
    for model in app.state.models.values():
        await model.engine.stop()


async def list_models(request: Request) -> ModelList:
    """The models that are served."""
    return ModelList(data=[model.entry for model in request.app.state.models.values()])


async def get_model(request: Request, name: str) -> ModelEntry:
    """One of them."""
    return served_model(request, name).entry


async def health(request: Request) -> dict[str, str]:
    """200 while the engines of all models run, else 503."""
    for model in request.app.state.models.values():
        if model.engine.failure is not None:
            raise api_errors.engine_failed(model.engine.failure)
    return {"status": "ok"}


async def show_metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    text = generate_latest(request.app.state.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


async def show_page(request: Request) -> Response:
    """The page for people."""
    name, media_type = _PAGE[request.url.path]
    content = files("sedac_runtime.serve").joinpath("page", name).read_bytes()
    return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

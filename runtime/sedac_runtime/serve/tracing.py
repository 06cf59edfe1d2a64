"""OpenTelemetry's spans: a span for each request, where the environment asks for it.

Off unless OTEL_TRACES_EXPORTER or an endpoint of OTLP is set, as OpenTelemetry's specification
names them. Only then is anything imported, of the extra sedac-runtime[otel]. Where an SDK has been
set up already, as by opentelemetry-instrument, spans go there.
"""

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from sedac_runtime._core import InputError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_NEEDED = (
    "opentelemetry.sdk",
    "opentelemetry.exporter.otlp.proto.http",
    "opentelemetry.instrumentation.fastapi",
)
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
# of a request's log, by the names of the semantic conventions for generative AI or our own
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "mode": "sedac.mode",
    "mean_exit_layer": "sedac.mean_exit_layer",
    "acceptance_rate": "sedac.acceptance_rate",
}


def instrument(application: FastAPI, environment: Mapping[str, str] = os.environ) -> None:
    """Trace the requests of `application` where `environment` asks for it. Raises InputError."""
    if not _is_asked_for(environment):
        return
    missing = [name for name in _NEEDED if not _is_installed(name)]
    if missing:
        raise InputError(
            f"the OTEL_* variables ask for traces, which need {', '.join(missing)}; pip install"
            " 'sedac-runtime[otel]'"
        )
    from opentelemetry import trace
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(_exporter(environment)))
        trace.set_tracer_provider(provider)
    # a span for each event of a stream would say nothing
    FastAPIInstrumentor.instrument_app(application, exclude_spans=["receive", "send"])


def current_span() -> "Span | None":
    """The span of the request that is being answered; None where it is not traced."""
    trace = sys.modules.get("opentelemetry.trace")
    span: Span | None = None if trace is None else trace.get_current_span()
    return span if span is not None and span.is_recording() else None


def trace_id(span: "Span") -> str:
    """The trace of `span`, in hexadecimal."""
    return f"{span.get_span_context().trace_id:032x}"


def describe(span: "Span", path: str, request_id: str, log: Mapping[str, Any]) -> None:
    """Give `span` the attributes of a request, of which `log` says how it went."""
    span.set_attribute("sedac.request_id", request_id)
    if path in _OPERATIONS:
        span.set_attribute("gen_ai.operation.name", _OPERATIONS[path])
    if "first_token_ms" in log:
        span.set_attribute("gen_ai.response.time_to_first_chunk", log["first_token_ms"] / 1e3)
    for field, name in _ATTRIBUTES.items():
        if field in log:
            span.set_attribute(name, log[field])


def _is_asked_for(environment: Mapping[str, str]) -> bool:
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    return exporter != "none" and bool(exporter or any(map(environment.get, _ENDPOINTS)))


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _exporter(environment: Mapping[str, str]) -> "SpanExporter":
    """What OTEL_TRACES_EXPORTER names. It reads its own settings from the environment."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    name = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if name not in ("otlp", "console"):
        raise InputError(f"OTEL_TRACES_EXPORTER {name!r} is not known; set otlp, console or none")
    if name == "console":
        return ConsoleSpanExporter()
    protocol = next(filter(None, map(environment.get, _PROTOCOLS)), "http/protobuf")
    if protocol != "http/protobuf":
        raise InputError(f"OTLP's protocol {protocol!r} is not supported; set http/protobuf")
    return OTLPSpanExporter()

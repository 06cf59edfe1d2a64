"""Spans of requests, by the SDK of OpenTelemetry."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import THREADS
from fastapi import FastAPI
from fastapi.testclient import TestClient

pytest.importorskip(
    "opentelemetry.instrumentation.fastapi", reason="of the extra sedac-runtime[otel]"
)

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sedac_runtime import InputError, SedacModel
from sedac_runtime.serve import tracing
from sedac_runtime.serve.json_logs import JsonFormatter
from sedac_runtime.serve.launch import SchedulerSettings, load_application
from sedac_runtime.serve.server_settings import ServerSettings

REQUEST: dict[str, Any] = {
    "model": "bundle",
    "prompt": "class Stack:\n",
    "temperature": 0,
    "max_tokens": 12,
}
PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # a process has but one
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture(scope="module")
def client(demo_bundle: Path, exporter: InMemorySpanExporter) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_TRACES_EXPORTER", "otlp")
        application = load_application(
            [demo_bundle],
            partial(SedacModel.from_pretrained, threads=THREADS),
            SchedulerSettings(max_sequences=2, max_queue=2, cache_tokens=None),
            ServerSettings(),
        )
    with TestClient(application) as client:
        yield client


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    assert span.attributes is not None
    return span


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_says_how_a_request_went(
    client: TestClient, spans: InMemorySpanExporter, stream: bool
) -> None:
    response = client.post("/v1/completions", json=REQUEST | {"stream": stream})
    assert response.status_code == 200
    span = only(spans)
    attributes = dict(span.attributes or {})
    assert span.name == "POST /v1/completions"
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.model"] == "bundle"
    assert attributes["gen_ai.usage.output_tokens"] == 12
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["sedac.mode"] == "lossless"
    assert attributes["sedac.mean_exit_layer"] == 12
    assert attributes["sedac.request_id"] == response.headers["x-request-id"]
    assert attributes["gen_ai.response.time_to_first_chunk"] > 0  # type: ignore[operator]
    if not stream:
        usage = response.json()["usage"]
        assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]


def test_drafts_and_exits_are_in_the_span(client: TestClient, spans: InMemorySpanExporter) -> None:
    repeats = REQUEST | {"prompt": "self.items.append(item)\n" * 12, "max_tokens": 40}
    summary = client.post("/v1/completions", json=repeats | {"sedac": {"drafter": "prompt-lookup"}})
    summary = summary.json()["choices"][0]["sedac"]["summary"]
    assert summary["drafted"] > 0
    expected = summary["accepted"] / summary["drafted"]
    attributes = dict(only(spans).attributes or {})
    assert attributes["sedac.acceptance_rate"] == pytest.approx(expected, abs=1e-3)


def test_a_refusal_is_a_span_too(client: TestClient, spans: InMemorySpanExporter) -> None:
    refused = client.post("/v1/completions", json=REQUEST | {"model": "none"})
    attributes = dict(only(spans).attributes or {})
    assert attributes["sedac.request_id"] == refused.headers["x-request-id"]
    assert "gen_ai.request.model" not in attributes


def test_a_log_line_has_the_trace_of_the_caller(
    client: TestClient, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    lines = []
    caplog.handler.setFormatter(JsonFormatter())
    with caplog.at_level(logging.INFO, "sedac_runtime.serve.request_gate"):
        client.post("/v1/completions", json=REQUEST, headers={"traceparent": PARENT})
        lines = [json.loads(line) for line in caplog.text.splitlines()]
    (line,) = [line for line in lines if line["message"] == "request"]
    context = only(spans).context
    assert context is not None
    assert line["trace_id"] == trace.format_trace_id(context.trace_id) == PARENT.split("-")[1]
    assert line["request_id"] == (only(spans).attributes or {})["sedac.request_id"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_nothing_is_imported_where_nothing_is_asked_for(environment: dict[str, str]) -> None:
    program = (
        "import sys, sedac_runtime.serve.launch\n"
        "from fastapi import FastAPI\n"
        f"sedac_runtime.serve.tracing.instrument(FastAPI(), {environment})\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_NEEDED", ("opentelemetry.nothing_like_it",))
    with pytest.raises(InputError, match=r"sedac-runtime\[otel\]"):
        tracing.instrument(FastAPI(), {"OTEL_TRACES_EXPORTER": "otlp"})


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"),
    ],
)
def test_what_is_not_exported_to_is_refused(environment: dict[str, str], word: str) -> None:
    with pytest.raises(InputError, match=word):
        tracing._exporter(environment)

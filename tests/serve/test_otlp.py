"""Spans as a collector of OpenTelemetry receives them from a server, over OTLP."""

import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest

pytest.importorskip(
    "opentelemetry.instrumentation.fastapi", reason="of the extra sedac-runtime[otel]"
)

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from serve.running_server import SECONDS, serving

REQUEST = {"model": "bundle", "prompt": "class Stack:\n", "temperature": 0, "max_tokens": 4}
TRACE = "0123456789abcdef0123456789abcdef"


class Collector(ThreadingHTTPServer):
    """Receives OTLP over HTTP. `received` has each request: its path, and what it exports."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.received: Queue[tuple[str, ExportTraceServiceRequest]] = Queue()


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/x-protobuf"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.put((self.path, ExportTraceServiceRequest.FromString(body)))
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def attributes(message: Any) -> dict[str, Any]:
    """By name, as they were sent."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in message}


def test_a_collector_receives_the_span_of_a_request(
    collector: Collector, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "texts")
    with serving(demo_bundle) as server:
        headers = {"traceparent": f"00-{TRACE}-0123456789abcdef-01"}
        response = httpx.post(f"{server.url}/v1/completions", json=REQUEST, headers=headers)
        assert response.status_code == 200
        # what has not been sent yet is sent at the end
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=SECONDS) == 0
    path, exported = collector.received.get(timeout=SECONDS)
    assert path == "/v1/traces"
    (resource,) = exported.resource_spans
    assert attributes(resource.resource.attributes)["service.name"] == "texts"
    (scope,) = resource.scope_spans
    (span,) = scope.spans
    assert (span.name, span.trace_id.hex()) == ("POST /v1/completions", TRACE)
    assert span.end_time_unix_nano > span.start_time_unix_nano, MessageToDict(span)
    sent = attributes(span.attributes)
    assert sent["gen_ai.request.model"] == "bundle"
    assert sent["gen_ai.usage.output_tokens"] == 4
    assert sent["sedac.request_id"] == response.headers["x-request-id"]

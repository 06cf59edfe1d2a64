"""The server as a process: its queue, its end, its log, its metrics, and clients that go."""

import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from bad_input.command import Command, assert_one_line_error, rewrite_file, spoil
from bad_input.conftest import runtime
from process_tree import has_ended, renderers
from prometheus_client.parser import text_string_to_metric_families
from server_process import free_port

from sedac_runtime.serve import serve_command
from serve.running_server import COMMAND, SECONDS, RunningServer, serving

__all__ = ["runtime"]

# more than the cache has room for: it ends when the cache is full
ENDLESS: dict[str, Any] = {
    "model": "bundle",
    "prompt": "def main():\n",
    "max_tokens": 100_000,
    "logit_bias": {"0": -100},
    "sedac": {"mode": "full"},
}
CHAT: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 1,
}
SHORT: dict[str, Any] = {"model": "bundle", "prompt": "import ", "max_tokens": 2}


@pytest.fixture
def small(demo_bundle: Path) -> Iterator[RunningServer]:
    """A server that runs one sequence and queues another."""
    arguments = ("--max-sequences", 1, "--max-queue", 1, "--threads", 1)
    with serving(demo_bundle, *arguments) as running:
        yield running


def metrics(server: RunningServer) -> dict[tuple[str, ...], float]:
    """Every sample: its name and the values of its labels, in the order of their names."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.02)


def is_idle(server: RunningServer) -> bool:
    samples = metrics(server)
    state = [samples.get((f"sedac_sequences_{name}", "bundle")) for name in ("running", "waiting")]
    return state == [0, 0]


def test_a_full_queue_is_429_and_has_room_again(small: RunningServer) -> None:
    with httpx.Client(base_url=small.url, timeout=SECONDS) as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as first:
            lines = first.iter_lines()  # which closes the response when it is collected
            next(lines)
            with ThreadPoolExecutor() as pool:
                second = pool.submit(http.post, "/v1/completions", json=SHORT)
                wait_until(lambda: metrics(small)["sedac_sequences_waiting", "bundle"] == 1)
                refused = http.post("/v1/completions", json=SHORT)
                assert refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["code"] == "queue_full"
                first.close()
                assert second.result().status_code == 200
        assert http.post("/v1/completions", json=SHORT).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_cancelled(small: RunningServer, stream: bool) -> None:
    body = json.dumps(ENDLESS | {"stream": stream}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"X-Request-Id: gone\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", small.port)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: metrics(small).get(("sedac_generated_tokens_total", "bundle"), 0) > 0)
    wait_until(lambda: is_idle(small))
    wait_until(lambda: bool(small.requests("gone")))
    (line,) = small.requests("gone")
    assert line["status"] == (200 if stream else 499)
    generated = metrics(small)["sedac_generated_tokens_total", "bundle"]
    assert generated < 1000
    # no step is run for it any more
    assert metrics(small)["sedac_generated_tokens_total", "bundle"] == generated


def test_a_request_that_takes_too_long_is_408(demo_bundle: Path) -> None:
    arguments = ("--request-timeout", 0.05, "--max-sequences", 1, "--threads", 1)
    with serving(demo_bundle, *arguments) as server:
        url = f"{server.url}/v1/completions"
        late = httpx.post(url, json=ENDLESS, timeout=SECONDS)
        assert late.status_code == 408
        assert late.json()["error"]["code"] == "request_timeout"
        streamed = httpx.post(
            url, json=ENDLESS | {"stream": True}, headers={"X-Request-Id": "mine"}, timeout=SECONDS
        )
        if streamed.status_code == 200:
            # the status had been sent: the last event says it
            last = json.loads(streamed.text.strip().split("data: ")[-1])
            assert last["error"]["code"] == "request_timeout"
            wait_until(lambda: bool(server.requests("mine")))
            assert server.requests("mine")[0]["error"] == "request_timeout"
        else:
            assert streamed.status_code == 408
        wait_until(lambda: is_idle(server))


def test_connections_over_the_limit_are_503(demo_bundle: Path) -> None:
    with serving(demo_bundle, "--max-connections", 1, "--threads", 1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as idle:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert idle.recv(64).startswith(b"HTTP/1.1 200")
            refused = httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=SECONDS)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "too_many_connections"
            assert refused.headers["retry-after"] == "1"
        wait_until(lambda: answers(f"{server.url}/health"))


def test_a_client_that_does_not_read_holds_nobody_up(demo_bundle: Path) -> None:
    """Its sequences end by the request timeout, and others are answered."""
    body = ENDLESS | {"stream": True, "n": 4, "logprobs": 20}
    arguments = ("--request-timeout", 3, "--max-sequences", 4)
    with serving(demo_bundle, *arguments) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        content = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            f"X-Request-Id: slow\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content)
        wait_until(lambda: bool(server.requests("slow")))
        wait_until(lambda: is_idle(server))
        answer = httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=SECONDS)
        assert answer.status_code == 200


def test_nan_in_one_sequence_is_an_error_of_that_one(demo_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    tables = bytearray((bundle / "onnx" / "rotary.data").read_bytes())
    row = 900 * 32 * 4  # of position 900, which one prompt reaches
    tables[row : row + 4] = struct.pack("<f", math.nan)
    rewrite_file(bundle, "onnx/rotary.data", bytes(tables))
    with serving(bundle, "--threads", 1) as server, ThreadPoolExecutor() as pool:
        url = f"{server.url}/v1/completions"
        body = ENDLESS | {"max_tokens": 300, "temperature": 0}
        alone = httpx.post(url, json=body, timeout=SECONDS).json()["choices"][0]["text"]
        others = [pool.submit(httpx.post, url, json=body, timeout=SECONDS) for _ in range(3)]
        wait_until(lambda: metrics(server)["sedac_sequences_running", "bundle"] == 3)
        spoilt = httpx.post(url, json=SHORT | {"prompt": [5] * 901}, timeout=SECONDS)
        assert spoilt.status_code == 500
        assert "not finite" in spoilt.json()["error"]["message"]
        assert [other.result().json()["choices"][0]["text"] for other in others] == [alone] * 3


def test_sigterm_lets_requests_finish(demo_bundle: Path) -> None:
    with serving(demo_bundle, "--threads", 1) as server:
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=ENDLESS | {"stream": True}, timeout=SECONDS
        ) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)

            def is_closed() -> bool:
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", server.port)) != 0

            wait_until(is_closed)
            assert list(lines)[-2] == "data: [DONE]"
        assert server.process.wait(timeout=SECONDS) == 0


def renderer_of(pid: int) -> int:
    """The one that a server starts, once it has become that program."""
    wait_until(lambda: len(renderers(pid)) == 1)
    (renderer,) = renderers(pid)
    return renderer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_renders_chats_is_ready_and_ends_with_the_server(
    chat_bundle: Path, number: signal.Signals
) -> None:
    with serving(chat_bundle, "--threads", 1) as server:
        ready = renderer_of(server.process.pid)
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=SECONDS)
        assert answer.status_code == 200
        assert renderers(server.process.pid) == {ready}
        # Ctrl-C goes to a group, and the server has chats to answer first
        assert os.getpgid(ready) != os.getpgid(server.process.pid)
        server.process.send_signal(number)
        server.process.wait(timeout=SECONDS)
        wait_until(lambda: has_ended(ready))


def test_chats_are_answered_when_every_process_is_told_to_stop(chat_bundle: Path) -> None:
    """As systemd tells a service's."""
    with serving(chat_bundle, "--threads", 1) as server:
        ask = partial(httpx.post, f"{server.url}/v1/chat/completions", json=CHAT, timeout=SECONDS)
        # once it answers, the renderer ignores the signal
        assert ask().status_code == 200
        ready = renderer_of(server.process.pid)
        os.kill(ready, signal.SIGTERM)
        assert ask().status_code == 200
        assert renderers(server.process.pid) == {ready}


def test_requests_are_logged_with_their_ids(small: RunningServer) -> None:
    given = httpx.post(
        f"{small.url}/v1/completions", json=SHORT, headers={"X-Request-Id": "mine"}, timeout=SECONDS
    )
    assert given.headers["x-request-id"] == "mine"
    wait_until(lambda: bool(small.requests("mine")))
    (line,) = small.requests("mine")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["model"], line["completion_tokens"]) == ("bundle", 2)
    assert line["finish_reasons"] == ["length"]
    bad = httpx.get(f"{small.url}/health", headers={"X-Request-Id": "two words"})
    assert bad.headers["x-request-id"].startswith("req-")
    # prompts and texts are nobody's business
    assert "import" not in str(small.lines)


def test_a_log_that_is_full_stops_nothing(demo_bundle: Path) -> None:
    """/dev/full fails every write as a full disk does."""
    port = free_port()
    with Path("/dev/full").open("w") as full:
        command = [*COMMAND, str(demo_bundle), "--port", str(port)]
        process = subprocess.Popen(command, stderr=full)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
        url = f"http://127.0.0.1:{port}/v1/completions"
        assert httpx.post(url, json=SHORT, timeout=SECONDS).status_code == 200
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_metrics_count_what_happens(small: RunningServer) -> None:
    answer = httpx.post(
        f"{small.url}/v1/completions", json=SHORT | {"max_tokens": 8}, timeout=SECONDS
    )
    tokens = answer.json()["usage"]["completion_tokens"]
    wait_until(lambda: ("sedac_requests_total", "/v1/completions", "200") in metrics(small))
    samples = metrics(small)
    assert samples["sedac_generated_tokens_total", "bundle"] == tokens
    assert samples["sedac_exit_layer_count", "bundle"] == tokens
    assert samples["sedac_exit_layer_bucket", "12.0", "bundle"] == tokens
    assert samples["sedac_time_to_first_token_seconds_count", "bundle"] == 1
    assert samples["sedac_inter_token_seconds_count", "bundle"] < tokens
    assert samples["sedac_prompt_tokens_total", "bundle"] == answer.json()["usage"]["prompt_tokens"]
    assert samples["sedac_cache_tokens_total", "bundle"] > 0


def test_metrics_count_the_drafts_of_a_text_that_a_stop_string_ends(small: RunningServer) -> None:
    request = SHORT | {"prompt": "x = 1\n" * 30, "temperature": 0, "max_tokens": 40}
    request["sedac"] = {"drafter": "prompt-lookup"}
    drafted = accepted = 0
    for reason in ("length", "stop"):
        answer = httpx.post(f"{small.url}/v1/completions", json=request, timeout=SECONDS)
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == reason
        assert choice["sedac"]["summary"]["accepted"] > 0
        drafted += choice["sedac"]["summary"]["drafted"]
        accepted += choice["sedac"]["summary"]["accepted"]
        # the next text would go on after this one
        request |= {"max_tokens": 60, "stop": choice["text"]}
    # a step may have begun before the stop string was seen
    samples = metrics(small)
    assert samples["sedac_draft_tokens_total", "bundle", "accepted"] >= accepted
    assert samples["sedac_draft_tokens_total", "bundle", "rejected"] >= drafted - accepted


def test_the_name_of_a_bundle_must_be_its_own(runtime: Command, demo_bundle: Path) -> None:
    assert_one_line_error(runtime("serve", demo_bundle, demo_bundle), "two bundles", "rename")


def test_a_port_in_use_is_refused_before_loading(runtime: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert_one_line_error(runtime("serve", "nowhere", "--port", port), str(port), "choose")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", 65536),
        ("--max-sequences", 0),
        ("--max-queue", -1),
        ("--max-connections", 0),
        ("--cache-tokens", 0),
        ("--request-timeout", 0),
        ("--request-timeout", "nan"),
        ("--memory-limit", "much"),
    ],
)
def test_options_out_of_range_are_refused(
    runtime: Command, demo_bundle: Path, option: str, value: object
) -> None:
    assert_one_line_error(runtime("serve", demo_bundle, option, value), option)


def test_without_the_extra_one_line_says_what_to_install(
    runtime: Command, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_command, "find_spec", lambda name: None)
    result = runtime("serve", demo_bundle)
    assert_one_line_error(result, "pip install 'sedac-runtime[serve]'", "fastapi")


def test_a_generation_that_fails_is_500_and_the_server_goes_on(
    demo_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    spoil(bundle, "layer_003", math.nan)
    with serving(bundle, "--threads", 1) as server:
        url = f"{server.url}/v1/completions"
        for stream in (False, True):
            response = httpx.post(url, json=SHORT | {"stream": stream}, timeout=SECONDS)
            assert response.status_code == 500
            assert "not finite" in response.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 200
        wait_until(lambda: is_idle(server))


def test_a_bundle_without_a_tokenizer_is_refused_by_request(
    tiny_bundle: Callable[[str], tuple[object, Path]],
) -> None:
    _, bundle = tiny_bundle("llama")
    with serving(bundle, "--threads", 1) as server:
        for prompt in ("import ", [5, 6]):
            body = SHORT | {"model": bundle.name, "prompt": prompt}
            response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS)
            assert response.status_code == 400
            assert "tokenizer" in response.json()["error"]["message"]


def test_an_empty_key_is_no_key(runtime: Command, demo_bundle: Path) -> None:
    result = runtime("serve", demo_bundle, "--api-key", "")
    assert_one_line_error(result, "--api-key", "empty")

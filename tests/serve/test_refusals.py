"""What a server refuses: status, shape and field of each error."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.running_server import RunningServer, serving

COMPLETION: dict[str, Any] = {"model": "chat", "prompt": "a", "max_tokens": 2, "temperature": 0}
CHAT: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 2,
}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def assert_error(response: httpx.Response, status: int, param: str | None = None) -> str:
    """OpenAI's shape, and the field. Returns the message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    message: str = error["message"]
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": [10**9]}, "prompt", "out of range"),
        ({"prompt": [-1]}, "prompt", "out of range"),
        ({"prompt": "a " * 5000}, "prompt", "shorten"),
        ({"best_of": 3}, "best_of", "leave it out"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"n": 100}, "n", "fewer"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "no token"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias", "no token"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias", "no token"),
        ({"sedac": {"mode": "exit", "tau": -1}}, "sedac", "tau"),
        ({"sedac": {"mode": "full", "tau": 0.9}}, "sedac", "tau"),
        ({"sedac": {"mode": "exit", "policy": "probe"}}, "sedac", "probe"),
        ({"sedac": {"drafter": "trained"}}, "sedac", "no trained drafter"),
        (
            {"sedac": {"repetition_penalty": 1e300}},
            "sedac.repetition_penalty",
            "less than or equal to 34000",
        ),
        ({"stream": True, "prompt": ""}, "prompt", "no tokens"),
    ],
)
def test_a_completion_that_cannot_be(
    http: httpx.Client, change: dict[str, Any], param: str, words: str
) -> None:
    response = http.post("/v1/completions", json=COMPLETION | change)
    assert words in assert_error(response, 400, param)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        (
            {"tools": [TOOL], "tool_choice": {**TOOL, "function": {"name": "g"}}},
            "tool_choice",
            "tools",
        ),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "missing"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "colour"}},
                }
            },
            "response_format",
            "schema",
        ),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "messages", "shorten"),
    ],
)
def test_a_chat_that_cannot_be(
    http: httpx.Client, change: dict[str, Any], param: str, words: str
) -> None:
    response = http.post("/v1/chat/completions", json=CHAT | change)
    assert words in assert_error(response, 400, param)


def test_a_model_without_a_chat_template(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json=CHAT | {"model": "bundle"})
    assert "no chat template" in assert_error(response, 400, "messages")
    response = http.post("/v1/chat/completions", json=CHAT | {"model": "bundle", "tools": [TOOL]})
    assert "chat template" in assert_error(response, 400, "tools")


def test_a_model_that_is_not_served(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json=COMPLETION | {"model": "gpt"})
    assert "chat, bundle" in assert_error(response, 404, "model")
    assert_error(http.get("/v1/models/gpt"), 404, "model")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"model": NaN', b"\xff", b"[" * 100_000, b"1" * 5000]
)
def test_a_body_that_is_no_object(http: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert_error(http.post("/v1/completions", content=body, headers=headers), 400)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_body_of_another_type_says_which_is_read(http: httpx.Client, path: str) -> None:
    """As curl sends it without a header."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    response = http.post(f"/v1/{path}", content=b'{"model": "chat"}', headers=headers)
    assert "Content-Type: application/json" in assert_error(response, 400)


def test_half_a_character_is_refused(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"model": "chat", "prompt": "\\ud800"}'
    assert_error(http.post("/v1/completions", content=body, headers=headers), 400, "prompt")
    body = b'{"model": "chat", "messages": [{"role": "user", "content": "\\ud800"}]}'
    response = http.post("/v1/chat/completions", content=body, headers=headers)
    assert_error(response, 400, "messages")


def test_an_unknown_path_and_method(http: httpx.Client) -> None:
    assert_error(http.get("/v2"), 404)
    response = http.get("/v1/completions")
    assert_error(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_body_over_the_limit(http: httpx.Client) -> None:
    large = b'{"model": "' + b"a" * (4 * 2**20)
    headers = {"Content-Type": "application/json"}
    assert_error(http.post("/v1/completions", content=large, headers=headers), 413)

    def pieces() -> Iterator[bytes]:
        yield from (large[at : at + 2**16] for at in range(0, len(large), 2**16))

    assert_error(http.post("/v1/completions", content=pieces(), headers=headers), 413)


def test_a_megabyte_of_prompt_cannot_fit(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json=COMPLETION | {"prompt": "word " * 200_000})
    assert "at most" in assert_error(response, 400, "prompt")


def test_a_prompt_that_the_caches_of_all_sequences_cannot_hold(demo_bundle: Path) -> None:
    with serving(demo_bundle, "--cache-tokens", 8, "--threads", 1) as server:
        body = COMPLETION | {"model": "bundle", "prompt": [5] * 9}
        response = httpx.post(f"{server.url}/v1/completions", json=body)
        assert "at most 8" in assert_error(response, 400, "prompt")


def test_headers_over_the_limit(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\nlong: " + b"a" * 2**16)
        assert connection.recv(64).startswith(b"HTTP/1.1 400")


def test_the_key_is_asked_for(demo_bundle: Path) -> None:
    with serving(demo_bundle, "--api-key", "sesame") as server:
        with httpx.Client(base_url=server.url) as http:
            for key in (None, "Bearer open", "sesame"):
                headers = {} if key is None else {"Authorization": key}
                response = http.get("/v1/models", headers=headers)
                assert "Bearer" in assert_error(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
            key = {"Authorization": "Bearer sesame"}
            assert http.get("/v1/models", headers=key).status_code == 200
            for path in ("/health", "/ready", "/metrics", "/"):
                assert http.get(path).status_code == 200
        assert "sesame" not in str(server.lines)

"""A server for many tests, and clients for it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="of the extra sedac-runtime[serve]")

from bad_input.command import rewrite_file
from openai import OpenAI

from serve.running_server import RunningServer, serving

# roles as plain text, tools as Qwen and Hermes have them
CHAT_TEMPLATE = """\
{% for message in messages %}
# {{ message.role }}: {{ message.content }}
{% endfor %}
{% if tools %}
# tools: {{ tools | tojson }}, called as <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}
# assistant:
"""


@pytest.fixture
def anyio_backend() -> str:
    """The event loop of tests that are coroutines."""
    return "asyncio"


@pytest.fixture(scope="session")
def chat_bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's bundle with a chat template."""
    bundle = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("chat") / "chat")
    rewrite_file(bundle, "chat_template.jinja", CHAT_TEMPLATE.encode())
    return bundle


@pytest.fixture(scope="session")
def server(chat_bundle: Path, demo_bundle: Path) -> Iterator[RunningServer]:
    """The models "chat" and "bundle"; each runs 4 sequences and queues 28."""
    arguments = ("--max-sequences", 4, "--max-queue", 28, "--threads", 1)
    with serving(chat_bundle, demo_bundle, *arguments) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    """OpenAI's client."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client

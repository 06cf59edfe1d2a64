"""The examples of the server, as a reader runs them."""

import subprocess
import sys
from pathlib import Path

from openai import OpenAI

from serve.running_server import RunningServer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def test_openai_client(server: RunningServer, client: OpenAI) -> None:
    expected = client.completions.create(
        model="chat",
        prompt="def main():",
        max_tokens=64,
        temperature=0,
        extra_body={"sedac": {"mode": "exit"}},
    )
    ran = run("openai_client.py", server.url, "chat", "def main():")
    assert ran.stdout == "def main():" + expected.choices[0].text
    assert 1 <= float(ran.stderr.split()[-1]) <= 12


def test_langchain_chat(server: RunningServer, client: OpenAI) -> None:
    question = "def main():"
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": question},
    ]
    expected = client.chat.completions.create(
        model="chat",
        messages=messages,
        max_tokens=64,
        temperature=0,  # type: ignore[arg-type]
    )
    ran = run("langchain_chat.py", server.url, "chat", question)
    assert ran.stdout == f"{expected.choices[0].message.content}\n"

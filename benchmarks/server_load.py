"""What a server gives 1, 8 and 32 clients at once, each asking for one text after the other.

    uv sync --inexact --group load
    python benchmarks/server_load.py BUNDLE --seconds 60
    python benchmarks/server_load.py BUNDLE --requests 1000 4000 5000 --max-tokens 4 --users 8

The clients are locust's. A token's time is that of the event that brings it: one with several
tokens counts as so many, equally far apart. The last column says how many requests the server
itself counts as answered; where these are not all, the exit code is 1.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import gevent
import numpy as np
from locust import HttpUser, task
from locust.env import Environment
from locust.exception import StopUser
from server_process import Server, serving

ANSWERED = 'sedac_requests_total{path="/v1/completions",status="200"}'
COLUMNS = (
    "users",
    "requests",
    "failures",
    "tokens/s",
    "first token, ms: median",
    "p99",
    "between tokens, ms: median",
    "p99",
    "memory, MB: before",
    "after",
    "answered",
)


@dataclass
class Load:
    """What clients are to ask for, and what they have seen. Times are in seconds. requests: None
    for as many as come before `end`, of time.perf_counter."""

    model: str
    mode: str
    max_tokens: int
    end: float
    requests: int | None
    asked: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def is_over(self) -> bool:
        """Whether no more is to be asked for."""
        if self.requests is not None:
            return self.asked >= self.requests
        return time.perf_counter() >= self.end

    def body(self) -> dict[str, Any]:
        """The next request, of which no other begins alike."""
        self.asked += 1
        return {
            "model": self.model,
            "prompt": f"# {random.getrandbits(32)}\ndef function_{self.asked}(self",
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "sedac": {"mode": self.mode},
        }

    def note(self, asked: float, arrivals: list[tuple[float, int]]) -> None:
        """Tokens came as `arrivals` says: when, and how many."""
        last = asked
        for index, (arrived, count) in enumerate(arrivals):
            if index == 0:
                self.first.append(arrived - asked)
            else:
                self.between += [(arrived - last) / count] * count
            last = arrived


class Client(HttpUser):
    """Streams texts until the load is over."""

    load: ClassVar[Load]

    @task
    def stream(self) -> None:
        """Ask for a text, and read it to its end."""
        if self.load.is_over():
            raise StopUser
        asked = time.perf_counter()
        with self.client.post(
            "/v1/completions", json=self.load.body(), stream=True, catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text}")
                return
            arrivals, usage = [], None
            for event in events(response):
                usage = event.get("usage") or usage
                count = sum(len(choice["sedac"]["tokens"]) for choice in event.get("choices", ()))
                if count:
                    arrivals.append((time.perf_counter(), count))
            if usage is None or usage["completion_tokens"] != sum(n for _, n in arrivals):
                response.failure("the stream has not all of its tokens")
                return
            self.load.note(asked, arrivals)
            self.load.tokens += usage["completion_tokens"]
            response.success()


def events(response: Any) -> Iterator[dict[str, Any]]:
    """The objects of a stream, as they arrive."""
    # chunks as they come, not filled up to a size
    for line in response.iter_lines(chunk_size=None):
        data = line.removeprefix(b"data: ")
        if data and data != b"[DONE]":
            yield json.loads(data)


def measure(server: Server, users: int, load: Load) -> tuple[list[str], bool]:
    """The row of `users` clients, and whether nothing was lost."""
    before, answered = server.memory(), server.metric(ANSWERED)
    Client.load = load
    environment = Environment(user_classes=[Client], host=f"http://127.0.0.1:{server.port}")
    runner = environment.create_local_runner()
    begun = time.perf_counter()
    runner.start(users, spawn_rate=users)
    runner.spawning_greenlet.join()
    while runner.user_count:
        gevent.sleep(0.05)
    seconds = time.perf_counter() - begun
    runner.quit()
    total = environment.stats.total
    for error in environment.stats.errors.values():
        print(f"{error.occurrences} times: {error.error}", file=sys.stderr)
    answered = server.metric(ANSWERED) - answered
    row = [
        f"{users}",
        f"{total.num_requests}",
        f"{total.num_failures}",
        f"{load.tokens / seconds:.1f}",
        *milliseconds(load.first),
        *milliseconds(load.between),
        f"{before}",
        f"{server.memory()}",
        f"{answered}",
    ]
    is_whole = 0 < total.num_requests == load.asked == answered
    return row, is_whole and total.num_failures == 0


def milliseconds(seconds: list[float]) -> list[str]:
    """The median and the 99th percentile."""
    if not seconds:
        return ["-", "-"]
    return [f"{value * 1e3:.1f}" for value in np.percentile(seconds, (50, 99))]


def main() -> int:
    """Print a table, a row for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each row")
    parser.add_argument(
        "--requests", type=int, nargs="+", help="of each row, however long they take"
    )
    parser.add_argument("--mode", choices=("full", "exit", "lossless"), default="lossless")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--backend", default="onnxruntime", help="the server's --backend")
    arguments = parser.parse_args()
    complete = True
    options = ("--backend", arguments.backend)
    with (
        tempfile.TemporaryDirectory() as directory,
        serving(arguments.bundle.resolve(), Path(directory) / "log", *options) as server,
    ):
        print(*COLUMNS, sep=" | ")
        for users, requests in product(arguments.users, arguments.requests or [None]):
            end = time.perf_counter() + arguments.seconds
            load = Load(server.model, arguments.mode, arguments.max_tokens, end, requests)
            row, is_whole = measure(server, users, load)
            print(*row, sep=" | ", flush=True)
            complete &= is_whole
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

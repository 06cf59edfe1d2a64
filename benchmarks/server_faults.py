"""What faults do to a server under load: how each ends, and what other clients notice of it.

    python benchmarks/server_faults.py BUNDLE

Four clients stream texts of 200 tokens, one after the other. During each fault the script counts
what they get, and the longest time that one of them waited between two events of a stream. BUNDLE
is one of demo/model, with a cache of 1024: a copy of it gets a rotary embedding that is NaN at one
position.
"""

import argparse
import hashlib
import json
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from server_process import Server, serving, wait_until

CLIENTS, TIMEOUT = 4, 30
OPTIONS = ("--max-sequences", 12, "--request-timeout", TIMEOUT)
# a position that only one prompt reaches, and the byte where its row of the first table begins
POSITION, ROW = 900, 900 * 32 * 4
TEXT: dict[str, Any] = {
    "prompt": "def main():\n",
    "max_tokens": 200,
    "temperature": 0,
    "logit_bias": {"0": -100},
    "sedac": {"mode": "full"},
    "stream": True,
}
# as many bytes of response as a server can send
ENDLESS = TEXT | {"max_tokens": 100_000, "n": 4, "logprobs": 20}


@dataclass
class Load:
    """Clients in threads, until `stop` is set."""

    server: Server
    stop: threading.Event = field(default_factory=threading.Event)
    answered: int = 0
    failed: int = 0
    longest: float = 0.0

    def run(self) -> None:
        """Ask for texts, one after the other."""
        while not self.stop.is_set():
            try:
                self._stream()
            except (httpx.HTTPError, AssertionError):
                self.failed += 1
                time.sleep(0.1)

    def _stream(self) -> None:
        body = TEXT | {"model": self.server.model}
        with httpx.stream("POST", self.server.url, json=body, timeout=60) as response:
            assert response.status_code == 200
            last, done = time.perf_counter(), False
            for line in response.iter_lines():
                now = time.perf_counter()
                if line:
                    self.longest, last = max(self.longest, now - last), now
                done |= line == "data: [DONE]"
        assert done
        self.answered += 1


@contextmanager
def under_load(name: str, server: Server) -> Iterator[list[str]]:
    """Clients at work. What the block says of the fault is printed with what they got."""
    load, facts = Load(server), [name]
    threads = [threading.Thread(target=load.run) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    load.longest = 0.0
    try:
        yield facts
    finally:
        load.stop.set()
    for thread in threads:
        thread.join()
    others = f"others: {load.answered} answered, {load.failed} failed"
    print(*facts, f"{others}, longest wait {load.longest * 1e3:.0f} ms", sep=" | ", flush=True)


def nothing(server: Server, facts: list[str]) -> None:
    """For comparison."""
    time.sleep(5)


def client_vanishes(server: Server, facts: list[str]) -> None:
    """Eight streams are closed after their first bytes."""
    connections = [ask_raw(server, TEXT | {"max_tokens": 900}) for _ in range(8)]
    for connection in connections:
        connection.recv(4096)
    running = server.running()
    for connection in connections:
        connection.close()
    begun = time.perf_counter()
    wait_until(lambda: server.running() <= CLIENTS)
    facts.append(f"{running} running, {CLIENTS} after {(time.perf_counter() - begun) * 1e3:.0f} ms")


def slow_reader(server: Server, facts: list[str]) -> None:
    """A stream of which nothing is read."""
    before, begun = server.memory(), time.perf_counter()
    connection = ask_raw(server, ENDLESS)
    wait_until(lambda: server.running() > CLIENTS)
    wait_until(lambda: server.running() <= CLIENTS)
    freed = time.perf_counter() - begun
    facts.append(f"sequences over after {freed:.1f} s")
    facts.append(f"memory {before} to {server.memory()} MB")
    connection.close()


def large_prompt(server: Server, facts: list[str]) -> None:
    """A megabyte."""
    refuse(server, facts, {"prompt": "word " * 200_000})


def many_stops(server: Server, facts: list[str]) -> None:
    """Ten thousand stop strings."""
    refuse(server, facts, {"stop": [f"stop {index}" for index in range(10_000)]})


def not_a_number(server: Server, facts: list[str]) -> None:
    """A prompt as long as only this one: the bundle's rotary embedding is NaN at its end."""
    refuse(server, facts, {"prompt": [5] * (POSITION + 1)})


def terminate(server: Server, facts: list[str]) -> None:
    """SIGTERM: what has arrived is answered, what comes later is refused."""
    begun = time.perf_counter()
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait()
    facts.append(f"exit code {code} after {time.perf_counter() - begun:.1f} s")


def refuse(server: Server, facts: list[str], change: dict[str, Any]) -> None:
    """A request that is answered with an error."""
    begun = time.perf_counter()
    body = TEXT | {"model": server.model, "stream": False} | change
    response = httpx.post(server.url, json=body, timeout=60)
    took = (time.perf_counter() - begun) * 1e3
    facts.append(f"status {response.status_code} after {took:.0f} ms")


def ask_raw(server: Server, body: dict[str, Any]) -> socket.socket:
    """A connection with a small buffer, on which `body` was sent."""
    content = json.dumps(body | {"model": server.model}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def spoil_position(bundle: Path) -> None:
    """Make the rotary embedding of position 900 NaN, with digests that fit."""
    file = bundle / "onnx" / "rotary.data"
    data = bytearray(file.read_bytes())
    data[ROW : ROW + 4] = b"\x00\x00\xc0\x7f"
    file.write_bytes(data)
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["onnx/rotary.data"]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(manifest))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "bundle.sha256").write_text(f"{digest}  bundle.json\n")


def main() -> None:
    """Print a line for each fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    faults = (nothing, client_vanishes, large_prompt, many_stops, not_a_number, slow_reader)
    with tempfile.TemporaryDirectory() as directory:
        spoilt = shutil.copytree(bundle, Path(directory) / "spoilt")
        spoil_position(spoilt)
        with serving(spoilt, Path(directory) / "log", *OPTIONS) as server:
            for fault in (*faults, terminate):
                with under_load(fault.__name__, server) as facts:
                    fault(server, facts)
        with (
            serving(bundle, Path("/dev/full"), *OPTIONS) as server,
            under_load("log on a full disk", server) as facts,
        ):
            nothing(server, facts)


if __name__ == "__main__":
    main()

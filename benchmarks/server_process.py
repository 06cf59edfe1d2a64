"""A server in a process of its own."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass
class Server:
    """A server's process, and where it listens. The metrics are those of its only model."""

    process: subprocess.Popen[bytes]
    model: str
    port: int

    @property
    def url(self) -> str:
        """The endpoint of all requests."""
        return f"http://127.0.0.1:{self.port}/v1/completions"

    def running(self) -> int:
        """Sequences that are generated."""
        return self.metric("sedac_sequences_running")

    def metric(self, beginning: str) -> int:
        """The sum of the metrics whose lines begin so."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith(beginning)]
        return sum(int(float(line.split()[-1])) for line in lines)

    def memory(self) -> int:
        """Megabytes that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) // 1024


@contextmanager
def serving(bundle: Path, log: Path, *options: object) -> Iterator[Server]:
    """A server of `bundle` that is ready, with these options of `sedac-runtime serve`."""
    port = free_port()
    command = [sys.executable, "-m", "sedac_runtime.cli", "serve", str(bundle), "--port", str(port)]
    command += map(str, options)
    with log.open("ab") as output:
        process = subprocess.Popen(command, stderr=output)
    server = Server(process, bundle.name, port)
    try:
        wait_until(lambda: process.poll() is not None or is_healthy(port))
        if process.poll() is not None:
            said = log.read_text().strip() if log.is_file() else "its log is no file"
            raise RuntimeError(f"the server ended: {said}")
        yield server
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_healthy(port: int) -> bool:
    """Whether a server at `port` is ready."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once `condition` is true; raise after two minutes."""
    end = time.monotonic() + 120
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it does not come true")
        time.sleep(0.01)

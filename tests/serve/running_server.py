"""sedac-runtime serve in a process of its own."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

SECONDS = 120
COMMAND = (sys.executable, "-m", "sedac_runtime.cli", "serve")


@dataclass
class RunningServer:
    """A server, and the lines of its log so far."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    started: Queue[int] = field(default_factory=Queue)
    port: int = 0

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    def read_log(self) -> None:
        """Collect the log until it ends."""
        assert self.process.stderr is not None
        for text in self.process.stderr:
            line = json.loads(text)
            self.lines.append(line)
            if line["message"] == "serving":
                self.started.put(line["port"])

    def requests(self, request_id: str) -> list[dict[str, Any]]:
        """What the log says of a request."""
        return [line for line in list(self.lines) if line.get("request_id") == request_id]


@contextmanager
def serving(*arguments: object) -> Iterator[RunningServer]:
    """A server with `arguments` on a free port, ready to answer; it is killed at the end."""
    command = [*COMMAND, *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    server = RunningServer(process)
    reader = threading.Thread(target=server.read_log)
    reader.start()
    try:
        server.port = server.started.get(timeout=SECONDS)
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()

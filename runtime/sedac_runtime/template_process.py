"""The process that renders a chat template, as its parent sees it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from tempfile import TemporaryFile
from typing import Any

from sedac_runtime import rendering

# renderings of a template: each takes a processor, for milliseconds, and some take much memory
_MOST_AT_ONCE = 4
# only what has evaded its own clock takes so long
_SECONDS = 2 * rendering.SECONDS
# JSON has at most 12 a character, in two halves
_MOST_BYTES = 13 * rendering.MOST_CHARACTERS


class TemplateProcess:
    """Renders one template in a process that is started when it is first needed, or before with
    `start`, and anew when it has ended. It ends with this object, and with this process."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._lock = threading.Lock()
        self._interpreter: _Interpreter | None = None
        self._free = threading.Semaphore(_MOST_AT_ONCE)

    def start(self) -> "_Interpreter":
        """Begin to import what renders, and to compile the template."""
        with self._lock:
            if self._interpreter is None or not self._interpreter.is_running:
                self._interpreter = _Interpreter(self._template)
            return self._interpreter

    def render(self, variables: str) -> dict[str, str]:
        """{text} or {error} of `variables`, an object in JSON."""
        with self._free:
            interpreter = self.start()
            try:
                answer = interpreter.ask(variables.encode())
            except TimeoutError:
                interpreter.end()
                answer = {"code": -signal.SIGALRM}
            except ConnectionError:  # even what answers for a rendering has been killed
                answer = {"code": -signal.SIGKILL}
        code = answer.pop("code", 0)
        if code in (-signal.SIGALRM, -signal.SIGXCPU):
            return {"error": f"it takes longer than {rendering.CPU_SECONDS} s"}
        return {"error": f"its interpreter ends with code {code}"} if code else answer


class _Interpreter:
    """One run of `rendering`."""

    def __init__(self, template: str) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_SECONDS)
        self._lock = threading.Lock()
        command = [sys.executable, "-I", "-S", rendering.__file__, str(theirs.fileno())]
        # a file, so that nothing has to wait until it is read
        with theirs, TemporaryFile() as request:
            request.write(
                json.dumps({"path": [*map(str, sys.path)], "template": template}).encode()
            )
            request.seek(0)
            self._process = subprocess.Popen(
                command,
                stdin=request,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for the parent, which may have chats to answer; and all end together
                process_group=0,
            )
        self.end = weakref.finalize(self, _end, self._process, self._control)

    @property
    def is_running(self) -> bool:
        """Whether it can be asked."""
        return self.end.alive and self._process.poll() is None

    def ask(self, request: bytes) -> dict[str, Any]:
        """{text}, {error}, or {code} where a process ends without. Raises TimeoutError."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                if not self._hand_over(theirs):
                    return {"code": self._process.wait()}
            ours.settimeout(_SECONDS)
            ours.sendall(request)
            ours.shutdown(socket.SHUT_WR)
            return _receive(ours)

    def _hand_over(self, connection: socket.socket) -> bool:
        """Give it the connection; False where it has ended."""
        try:
            with self._lock:
                socket.send_fds(self._control, [b"."], [connection.fileno()])
                # macOS loses one that is closed before it is received
                return self._control.recv(1) != b""
        except TimeoutError:
            raise
        except OSError:
            return False


def _receive(connection: socket.socket) -> dict[str, Any]:
    received = bytearray()
    while part := connection.recv(2**16):
        received += part
        if len(received) > _MOST_BYTES:
            return {"error": rendering.TOO_LONG}
    # before the last line is what a process wrote that was ended while it did
    _, _, last = received.rpartition(b"\n")
    if not last:
        raise ConnectionError("no answer")
    answer: dict[str, Any] = json.loads(last)
    return answer


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

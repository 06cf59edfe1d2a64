"""A process that runs one flavour of TensorRT and is asked over a pipe.

A process serves one flavour: polygraphy chooses it when it is imported. Apart from that TensorRT
prints to standard output and may end its process, neither of which the command should do.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from sedac_export.errors import SedacError
from sedac_export.tensorrt.installed import require
from sedac_runtime.flavour import FLAVOURS, Target


class Worker:
    """The process of one flavour, for a with statement."""

    def __init__(self, target: Target) -> None:
        self.flavour = require(target)
        self.target = target

    def __enter__(self) -> "Worker":
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, self.target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # a build that was interrupted is not waited for
        if kind is not None:
            self.process.kill()
        self.process.communicate()
        self.log.close()

    def call(self, function: str, **arguments: Any) -> Any:
        """What `function` of sedac_export.tensorrt.native returns for JSON-able `arguments`.

        Raises SedacError with TensorRT's own reason when it fails, and when the process ends.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([function, arguments]) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SedacError(f"{self.flavour.title} ended unasked ({self._ending()})")
        answer = json.loads(line)
        if "error" in answer:
            raise SedacError(f"{self.flavour.title}: {answer['error']}")
        return answer["result"]

    def _ending(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}: {last.strip()}" if last else how


def _serve(target: str) -> None:
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(target == "tensorrt-rtx"))
    # what native code prints goes where logs go
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from sedac_export.tensorrt import native

    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            answer = {"result": getattr(native, function)(**arguments)}
        except Exception as error:  # every failure of the library belongs to the caller
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    assert sys.argv[1] in FLAVOURS
    _serve(sys.argv[1])

"""sedac_runtime.ray on a Ray cluster of this machine, which `serve run` starts and stops."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from server_process import free_port

SECONDS = 180
COMMAND = (sys.executable, "-m", "ray.serve.scripts", "run")
_REPLICA = "ray::ServeReplica:default:BundleServer"


@dataclass
class RayCluster:
    """A running application. log: what Serve and the replicas wrote."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def replicas(self) -> list[int]:
        """The processes of the replicas: Ray gives their names to the processes of its session."""
        return [process for process in self._processes() if _command(process).startswith(_REPLICA)]

    def is_ready(self) -> bool:
        """Whether a request is answered."""
        try:
            return httpx.get(f"{self.url}/v1/models", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End the cluster, and what is left of it."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in self._processes():
            os.kill(process, signal.SIGKILL)

    def _processes(self) -> list[int]:
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [process for process in found if _session(process) == self.process.pid]


@contextmanager
def ray_serving(**application: Any) -> Iterator[RayCluster]:
    """`serve run` with an application of these settings, ready to answer at a free port."""
    # the paths of Ray's sockets are limited to 107 bytes
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as directory:
        environment = os.environ | {
            "RAY_TMPDIR": directory,
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
        }
        port, config = free_port(), Path(directory) / "config.yaml"
        options = {"host": "127.0.0.1", "port": port, "request_timeout_s": SECONDS}
        application = {"name": "default", "import_path": "sedac_runtime.ray:app", **application}
        config.write_text(yaml.safe_dump({"http_options": options, "applications": [application]}))
        log = Path(directory) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*COMMAND, str(config)],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        cluster = RayCluster(process, port, log)
        try:
            wait_until(lambda: process.poll() is not None or cluster.is_ready())
            assert process.poll() is None, log.read_text(errors="replace")
            yield cluster
        finally:
            cluster.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    """Raise unless `condition` comes true."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.1)


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def _session(process: int) -> int | None:
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return None

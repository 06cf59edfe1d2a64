"""An application for Ray Serve, the extra sedac-runtime[ray].

serve run sedac_runtime.ray:app bundles=engines/demo,engines/qwen max_replicas=4

Each replica loads every bundle, and answers as `sedac-runtime serve` does.
"""

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sedac_runtime.engine_options import BackendName, DeviceName, Verify, parse_bytes
from sedac_runtime.model import SedacModel
from sedac_runtime.ranges import MOST_THREADS
from sedac_runtime.serve.json_logs import log_json
from sedac_runtime.serve.launch import SchedulerSettings, load_application
from sedac_runtime.serve.server_settings import ServerSettings

# seconds after which a client may try again when the queue is full
_RETRY_AFTER = 1
_GPU_BACKENDS = (BackendName.CUDA, BackendName.TENSORRT, BackendName.TENSORRT_RTX)


def _split(bundles: Any) -> Any:
    return list(filter(None, bundles.split(","))) if isinstance(bundles, str) else bundles


def _bytes(limit: Any) -> Any:
    return parse_bytes(limit) if isinstance(limit, str) else limit


class Arguments(BaseModel):
    """Arguments of the application: `name=value` after it, or `args` in a Serve config file.

    bundles: directories on every node, separated by commas, or a list in a config file. threads:
    of one replica, which reserves as many CPUs. max_sequences: generated at once by one replica;
    more sequences of all models together, on average, add a replica. max_queue: requests that wait
    at each proxy. The others are as for `sedac-runtime serve`.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: Annotated[list[Path], BeforeValidator(_split), Field(min_length=1)]
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    max_sequences: Annotated[int, Field(ge=1, le=1024)] = 8
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 64  # Ray cannot do without one
    cache_tokens: Annotated[int | None, Field(ge=1)] = None
    request_timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] = 1
    backend: BackendName = BackendName.ONNXRUNTIME
    device: DeviceName | None = None
    verify: Verify = Verify.ALWAYS
    memory_limit: Annotated[int | None, BeforeValidator(_bytes), Field(ge=1)] = None

    @property
    def needs_gpu(self) -> bool:
        """Whether a replica takes a GPU for itself."""
        return self.backend in _GPU_BACKENDS or self.device is DeviceName.CUDA


@serve.ingress()
class BundleServer:
    """A replica: the bundles, loaded, behind the HTTP application of `sedac-runtime serve`."""

    def __init__(self, arguments: Arguments) -> None:
        load = partial(
            SedacModel.from_pretrained,
            threads=arguments.threads,
            backend=arguments.backend.value,
            device=None if arguments.device is None else arguments.device.value,
            verify=arguments.verify.value,
            memory_limit=arguments.memory_limit,
        )
        log_json()
        self._application = load_application(
            arguments.bundles,
            load,
            SchedulerSettings(arguments.max_sequences, arguments.max_queue, arguments.cache_tokens),
            ServerSettings(
                api_key=os.environ.get("SEDAC_API_KEY") or None,
                request_timeout=arguments.request_timeout,
            ),
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _WithoutRequestId(self._application)

    def check_health(self) -> None:
        """Raise where engines have failed: Ray then replaces the replica."""
        for model in self._application.state.models.values():
            if model.engine.failure is not None:
                raise RuntimeError(f"the engines of {model.name} have failed")


class _WithoutRequestId:
    """Leaves X-Request-Id to Ray's proxy, which adds the same id to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without_id)


def app(arguments: Arguments) -> Application:
    """The application, for `serve run sedac_runtime.ray:app` and Serve config files."""
    deployment = serve.deployment(
        max_ongoing_requests=arguments.max_sequences,
        max_queued_requests=arguments.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER),
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.max_sequences,
        },
        ray_actor_options={
            "num_cpus": arguments.threads,
            "num_gpus": 1 if arguments.needs_gpu else 0,
        },
        graceful_shutdown_timeout_s=arguments.request_timeout,
    )
    return deployment(BundleServer).bind(arguments)

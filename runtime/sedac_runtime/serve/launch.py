"""Load bundles, and serve them until the process is told to stop."""

import contextlib
import logging
import math
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from sedac_runtime import _core
from sedac_runtime._core import InputError
from sedac_runtime.model import SedacModel
from sedac_runtime.serve.application import create_application
from sedac_runtime.serve.engine_thread import EngineThread
from sedac_runtime.serve.json_logs import log_json
from sedac_runtime.serve.served_model import ServedModel
from sedac_runtime.serve.server_metrics import ModelMetrics, ServerMetrics
from sedac_runtime.serve.server_settings import ServerSettings

_LOG = logging.getLogger(__name__)
# sequences at once of each of several models
_OF_SEVERAL = 8
# of a request's line and headers, in bytes
_MAX_HEADERS = 32 * 2**10


@dataclass(frozen=True)
class SchedulerSettings:
    """Of each model, max_sequences run at once; max_queue wait. None: what suits the backend of a
    model alone, or 8 of each of several. cache_tokens: positions in their KV caches together, None
    for as many as that number of the longest sequences take."""

    max_sequences: int | None
    max_queue: int
    cache_tokens: int | None

    def among(self, models: int) -> "SchedulerSettings":
        """Those of each of so many models, of which the first could take all memory."""
        if models == 1 or self.max_sequences is not None:
            return self
        return replace(self, max_sequences=_OF_SEVERAL)


def serve_bundles(
    bundles: Sequence[Path],
    load: Callable[[Path], SedacModel],
    address: tuple[str, int],
    scheduling: SchedulerSettings,
    settings: ServerSettings,
) -> None:
    """Serve `bundles` at `address` (host and port) until SIGTERM or SIGINT, then answer what has
    arrived. Raises SedacError and OSError before that.
    """
    with _bound(*address) as listener:
        application = load_application(bundles, load, scheduling, settings)
        config = uvicorn.Config(
            application,
            http="h11",  # the one that limits headers
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(settings.request_timeout),
            h11_max_incomplete_event_size=_MAX_HEADERS,
        )
        log_json()
        _allow_files(2 * settings.max_connections)
        server = _Server(config)
        application.state.connections = server.server_state.connections
        # uvicorn raises the signal that ended it once more
        signal.signal(signal.SIGTERM, lambda *_: None)
        server.run(sockets=[listener])


def load_application(
    bundles: Sequence[Path],
    load: Callable[[Path], SedacModel],
    scheduling: SchedulerSettings,
    settings: ServerSettings,
) -> FastAPI:
    """The application that serves `bundles`. Raises SedacError."""
    names = _names(bundles)
    models = [load(bundle) for bundle in bundles]
    metrics = ServerMetrics(max(model.num_layers for model in models))
    each = scheduling.among(len(models))
    served = [
        serve_model(name, model, metrics, each) for name, model in zip(names, models, strict=True)
    ]
    return create_application(served, metrics, settings)


def serve_model(
    name: str, model: SedacModel, metrics: ServerMetrics, scheduling: SchedulerSettings
) -> ServedModel:
    """A loaded bundle, with an engine thread that is not started yet."""
    scheduler = _core.Scheduler(
        model.core,
        max_sequences=scheduling.max_sequences,
        cache_tokens=scheduling.cache_tokens,
    )
    capacity = scheduler.max_sequences + scheduling.max_queue
    engine = EngineThread(scheduler, ModelMetrics(metrics, name), capacity)
    metrics.schedulers.watch(name, scheduler)
    return ServedModel(name, model, engine)


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            _LOG.info("serving", extra={"fields": {"host": host, "port": port}})


def _names(bundles: Sequence[Path]) -> list[str]:
    """What requests call the bundles: the names of their directories."""
    names = [bundle.resolve().name for bundle in bundles]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two bundles are called {name}; rename the directory of one")
    return names


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address, before time is spent on loading. Raises OSError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as stack:
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            stack.pop_all()
            return bound
    except OSError as error:
        raise OSError(
            f"cannot serve at {host} port {port} ({error.strerror}); choose another --host or"
            " --port"
        ) from error


def _allow_files(count: int) -> None:
    """Let the process have `count` open files, or as many as it may: connections are files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

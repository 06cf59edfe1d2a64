"""sedac-runtime serve."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sedac_runtime._core import InputError
from sedac_runtime.engine_options import (
    BackendName,
    BackendOption,
    DeviceOption,
    MemoryOption,
    ThreadsOption,
    Verify,
    VerifyOption,
    parse_bytes,
)
from sedac_runtime.model import SedacModel
from sedac_runtime.ranges import check_count

# of the extra sedac-runtime[serve]
_NEEDED = ("fastapi", "llguidance", "prometheus_client", "pydantic", "uvicorn")
_LONGEST_TIMEOUT = 86400


def serve(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            help="Directories of bundles; requests call each by its directory's name.",
            metavar="BUNDLE",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SEDAC_API_KEY",
            help="Key that requests must present; an option is visible to other users of the"
            " machine, the variable is not. [default: none]",
        ),
    ] = None,
    max_sequences: Annotated[
        int | None,
        typer.Option(
            help="Sequences of a model that are generated at once. [default: 8; of one bundle with"
            " cuda 64, or as many as the GPU's memory has room for]"
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(help="Sequences of a model that may wait; more are refused with status 429."),
    ] = 64,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            help="Positions in the KV caches of all sequences of a model together."
            " [default: room for --max-sequences of the longest]"
        ),
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds from a request to its last token.")
    ] = 600.0,
    max_connections: Annotated[
        int, typer.Option(help="Connections at once; more are refused with status 503.")
    ] = 4096,
    threads: ThreadsOption = None,
    backend: BackendOption = BackendName.ONNXRUNTIME,
    device: DeviceOption = None,
    verify: VerifyOption = Verify.ALWAYS,
    memory_limit: MemoryOption = None,
) -> None:
    """Serve bundles with OpenAI's API, and a page to chat with them.

    SIGTERM ends the server once it has answered what has arrived.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"serve needs {', '.join(missing)}; pip install 'sedac-runtime[serve]'")
    from sedac_runtime.serve.launch import SchedulerSettings, serve_bundles
    from sedac_runtime.serve.server_settings import ServerSettings

    if api_key == "":
        raise InputError("--api-key is empty; give a key, or leave it out for none")
    check_count("--port", port, 0, 65535)
    if max_sequences is not None:
        check_count("--max-sequences", max_sequences, 1, 1024)
    check_count("--max-queue", max_queue, 0, 1_000_000)
    check_count("--max-connections", max_connections, 1, 1_000_000)
    if cache_tokens is not None:
        check_count("--cache-tokens", cache_tokens, 1)
    if not 0 < request_timeout <= _LONGEST_TIMEOUT:
        raise InputError(
            f"--request-timeout {request_timeout:g} is out of range: above 0, at most"
            f" {_LONGEST_TIMEOUT}"
        )
    load = partial(
        SedacModel.from_pretrained,
        threads=threads,
        backend=backend.value,
        device=None if device is None else device.value,
        verify=verify.value,
        memory_limit=parse_bytes(memory_limit),
    )
    serve_bundles(
        bundles,
        load,
        (host, port),
        SchedulerSettings(max_sequences, max_queue, cache_tokens),
        ServerSettings(
            api_key=api_key,
            request_timeout=request_timeout,
            max_connections=max_connections,
        ),
    )

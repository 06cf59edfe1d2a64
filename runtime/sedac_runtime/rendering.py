"""Render one chat template, in separate processes, which the system limits and ends.

A template is a program that came with a bundle. The sandbox bounds what it can reach; time and
memory are bounded by the system, for each is spent in ways that no list of operations covers.

This program compiles the template once, without any messages, and forks for each rendering. A fork
costs a millisecond or two, where an interpreter that imports jinja2 costs sixty; and all that a
rendering leaves in memory ends with it, even where it finds a way out of the sandbox.
"""

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

CPU_SECONDS = 2
SECONDS = 6  # wall-clock, generous for a busy machine
MEMORY = 2**29  # bytes, the interpreter included
MOST_CHARACTERS = 2**22
TOO_LONG = f"it gives more than {MOST_CHARACTERS} characters"

Render = Callable[[dict[str, Any]], str]


def main() -> None:
    """Read {path, template} from stdin, and answer the connections that come through the socket
    whose number is the argument, until its other end is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    # systemd tells every process of a service to stop, and the server has chats to answer first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with sys.stdin as stdin:
        request = json.load(stdin)
    sys.path = request["path"]
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _limit(kind, most)
    _start_clock()
    render = _compiled(request["template"])
    _stop_clock()
    # so ended children need not be waited for
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while (connection := _accept(control)) is not None:
        if os.fork() == 0:
            # whoever holds it would receive the messages of others
            control.close()
            _run(lambda: _supervise(connection, render))
        connection.close()


def _accept(control: socket.socket) -> socket.socket | None:
    """The next connection, receipt of which is confirmed; None at the end."""
    _, files, _, _ = socket.recv_fds(control, 1, 1)
    if not files:
        return None
    control.sendall(b".")
    return socket.socket(fileno=files[0])


def _run(work: Callable[[], None]) -> NoReturn:
    """Do `work`, all that is left for this process to do."""
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def _supervise(connection: socket.socket, render: Render) -> None:
    """Have {variables} rendered in a process of its own, to {text} or {error}; {code} where it ends
    otherwise."""
    with connection.makefile("rb") as file:
        request = file.read()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        _start_clock()
        _run(lambda: _send(connection, _answer(render, request)))
    _, status = os.waitpid(child, 0)
    if status != 0:
        _send(connection, {"code": os.waitstatus_to_exitcode(status)})


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    # a line of its own: another process may have been ended amid its answer
    connection.sendall(b"\n" + json.dumps(answer).encode())


def _start_clock() -> None:
    _limit(resource.RLIMIT_CPU, CPU_SECONDS)
    signal.alarm(SECONDS)


def _stop_clock() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    signal.alarm(0)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, hard))


def _answer(render: Render, request: bytes) -> dict[str, str]:
    try:
        text = render(json.loads(request))
    except Exception as error:
        return {"error": _reason(error)}
    if len(text) > MOST_CHARACTERS:
        return {"error": TOO_LONG}
    return {"text": text}


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY // 2**20} MiB of memory"
    return f"{type(error).__name__}: {error}"


def _compiled(template: str) -> Render:
    """What renders `template`; what cannot be compiled fails at each rendering."""
    try:
        return _compile(template)
    except Exception as error:
        failure = error

    def fail(_: dict[str, Any]) -> NoReturn:
        raise failure

    return fail


def _compile(template: str) -> Render:
    """As transformers does."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what a model wrote, for training; here its contents count as is."""

        tags: set[str] = {"generation"}  # noqa: RUF012 - so declared by its base

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    always = {"tools": None, "documents": None, "add_generation_prompt": True}
    compiled = environment.from_string(template)
    return lambda variables: compiled.render(always | variables)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


if __name__ == "__main__":
    main()

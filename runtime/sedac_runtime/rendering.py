"""Render one chat template, in a separate process, which its parent can limit and end.

A template is a program that came with a bundle. The sandbox bounds what it can reach; time and
memory are bounded by the system, for each is spent in ways that no list of operations covers.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

CPU_SECONDS = 2
MEMORY = 2**29  # bytes, the interpreter included
MOST_CHARACTERS = 2**22
_MOST_BYTES = 8 * MOST_CHARACTERS  # JSON has at most 6 a character


def main() -> None:
    """Read {path, template, variables} from stdin, write {text} or {error} to stdout."""
    for kind, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, _MOST_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, hard))
    request = json.load(sys.stdin)
    sys.path = request["path"]
    print(json.dumps(_answer(request["template"], request["variables"])))


def _answer(template: str, variables: dict[str, Any]) -> dict[str, str]:
    try:
        text = _render(template, variables)
    except MemoryError:
        return {"error": f"it needs more than {MEMORY // 2**20} MiB of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if len(text) > MOST_CHARACTERS:
        return {"error": f"it gives more than {MOST_CHARACTERS} characters"}
    return {"text": text}


def _render(template: str, variables: dict[str, Any]) -> str:
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
    return environment.from_string(template).render(always | variables)


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

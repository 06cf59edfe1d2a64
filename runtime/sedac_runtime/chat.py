"""Apply a bundle's chat template, as transformers renders it."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sedac_runtime._core import InputError

Message = dict[str, Any]


def render_chat(bundle: Path, messages: list[Message]) -> str:
    """The prompt that asks the model of `bundle` for the next message.

    messages: dicts of role and content. Raises InputError when the bundle has no chat template or
    the template refuses the messages.
    """
    template, tokens = _read(bundle)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
        )
    except TemplateError as error:
        raise InputError(
            f"the chat template of {bundle} refuses these messages: {error}"
        ) from error


def _read(bundle: Path) -> tuple[str, dict[str, str]]:
    """The template and the special tokens by name."""
    config: dict[str, Any] = {}
    path = bundle / "tokenizer_config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
    template = config.get("chat_template")
    if (bundle / "chat_template.jinja").exists():
        template = (bundle / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if not template:
        raise InputError(f"{bundle} has no chat template; generate without --chat")
    tokens = {}
    for name, value in config.items():
        if name.endswith("_token") and value is not None:
            tokens[name] = value["content"] if isinstance(value, dict) else str(value)
    return template, tokens


class _Generation(Extension):
    """The tag that marks what a model wrote, for training; here its contents count as they are."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - so declared by its base

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)

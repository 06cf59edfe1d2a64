"""Apply a bundle's chat template, as transformers renders it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sedac_runtime._core import BundleError, InputError
from sedac_runtime.template_process import TemplateProcess

Message = dict[str, Any]
Texts = Mapping[str, str | None]

_LONGEST_REASON = 300
_CONFIG = "tokenizer_config.json"
# where transformers saves a tokenizer's templates, by the names that it gives them
_TEMPLATES = {
    "default": "chat_template.jinja",
    "tool_use": "additional_chat_templates/tool_use.jinja",
}
# of a bundle, that chats are rendered from
FILES = (*_TEMPLATES.values(), _CONFIG)


class ChatTemplates:
    """The chat templates of a bundle, each with the process that renders it.

    texts: of the bundle's FILES, None where it has no such file.
    """

    def __init__(self, bundle: Path, texts: Texts) -> None:
        self._bundle = bundle
        self._texts = texts
        self._processes: dict[str, TemplateProcess] = {}

    def start(self) -> None:
        """Have ready what renders chats, where there is a template. Raises BundleError."""
        with suppress(InputError):
            for with_tools in (False, True):
                template, _ = self.read(with_tools)
                self._process(template).start()

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The prompt that asks the model for the next message.

        messages: dicts of role and content. tools: functions that the model may call, as the
        template expects them. Raises InputError when the bundle has no chat template, or the
        template refuses the messages, fails, or takes too much time or memory; BundleError when
        what the bundle holds of it cannot be read.
        """
        template, tokens = self.read(with_tools=tools is not None)
        variables = {"messages": [*map(_without_nones, messages)], "tools": tools, **tokens}
        name = f"the chat template of {self._bundle}"
        return render(name, self._process(template), variables)

    def read(self, with_tools: bool = False) -> tuple[str, dict[str, str]]:
        """The chat template, of several the one for tools, and the special tokens by name.

        Raises as `render` does.
        """
        config = _read_config(self._bundle, self._texts)
        named = _named_templates(config.get("chat_template"))
        named |= {name: self._texts[file] for name, file in _TEMPLATES.items() if self._texts[file]}
        template = (named.get("tool_use") if with_tools else None) or named.get("default")
        if not (isinstance(template, str) and template):
            raise InputError(
                f"{self._bundle} has no chat template, which --chat and chat completions need;"
                " give a prompt"
            )
        return template, _special_tokens(config)

    def special_tokens(self) -> dict[str, str]:
        """By name, such as bos_token. Raises BundleError as `render` does."""
        return _special_tokens(_read_config(self._bundle, self._texts))

    def _process(self, template: str) -> TemplateProcess:
        return self._processes.setdefault(template, TemplateProcess(template))


def _without_nones(message: Any) -> Any:
    """What has no value, such as the content beside tool calls, is not there for a template."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None}


def render(name: str, process: TemplateProcess, variables: dict[str, Any]) -> str:
    """The text that the template of `process`, called `name` in errors, makes of `variables`.

    Raises InputError when it fails, or takes too much time or memory.
    """
    try:
        request = json.dumps(variables)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the messages for {name} are not JSON ({error}); give texts") from error
    answer = process.render(request)
    if "text" in answer:
        return answer["text"]
    reason = " ".join(answer["error"].split())[:_LONGEST_REASON]
    raise InputError(
        f"{name} fails on these messages ({reason}); correct it or them, or give a prompt that"
        " needs no template"
    )


def _named_templates(configured: Any) -> dict[str, Any]:
    """The templates of a tokenizer's configuration, one or a list of named ones."""
    if not isinstance(configured, list):
        return {"default": configured}
    return {str(t.get("name")): t.get("template") for t in configured if isinstance(t, dict)}


def _read_config(bundle: Path, texts: Texts) -> dict[str, Any]:
    text = texts[_CONFIG]
    return {} if text is None else _parse(bundle / _CONFIG, text)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name, value in config.items():
        # others, such as add_bos_token, say what to do
        if name.endswith("_token") and isinstance(value, str | dict):
            tokens[name] = str(value.get("content") if isinstance(value, dict) else value)
    return tokens


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} is not JSON ({error}); build or copy the bundle again"
        ) from error
    if not isinstance(parsed, dict):
        raise BundleError(f"{path} is not a JSON object; build or copy the bundle again")
    return parsed

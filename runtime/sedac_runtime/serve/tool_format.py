"""Tool calls, as the chat templates of model families have them."""

import json
import uuid
from dataclasses import dataclass
from typing import Literal

from sedac_runtime.serve.chat_request import FunctionDefinition
from sedac_runtime.serve.response_bodies import CalledFunction, MadeToolCall

_ANYTHING = {"type": "object"}


@dataclass(frozen=True)
class ToolFormat:
    """How a model family writes a call: a JSON object, between `start` and `end` if it has them.

    hint: words of a chat template that identify the family. opening: the text that a call begins
    with. arguments: the object's key for them.
    """

    hint: str
    opening: str
    start: str
    end: str
    arguments: Literal["arguments", "parameters"]

    def parse(self, text: str) -> list[MadeToolCall] | None:
        """The calls in `text`, which begins with `opening`; None where it holds anything else."""
        parts = text.split(self.start) if self.start else [text]
        written = [part.partition(self.end)[0] if self.end else part for part in parts]
        calls = [self._call(part) for part in written if part.strip()]
        return [call for call in calls if call] if calls and all(calls) else None

    def grammar(self, functions: list[FunctionDefinition]) -> str:
        """One call of any of `functions`, in llguidance's variant of Lark.

        Each schema of arguments is a grammar by itself: its references are relative to its root.
        """
        before = _literal(self.start + "\n") + " " if self.start else ""
        after = " " + _literal("\n" + self.end) if self.end else ""
        names = " | ".join(f"call_{index}" for index in range(len(functions)))
        rules = [f"start: {before}call{after}", f"call: {names}"]
        for index, function in enumerate(functions):
            name, schema = json.dumps(function.name), json.dumps(function.parameters or _ANYTHING)
            head = _literal(f'{{"name": {name}, "{self.arguments}": ')
            rules.append(f'call_{index}: {head} arguments_{index} "}}"')
            rules.append(f"arguments_{index}: %json {schema}")
        return "\n".join(rules)

    def _call(self, written: str) -> MadeToolCall | None:
        try:
            call = json.loads(written)
        except (ValueError, RecursionError):
            return None
        if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
            return None
        arguments = call.get(self.arguments, {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        function = CalledFunction(name=call["name"], arguments=text)
        return MadeToolCall(id=f"call_{uuid.uuid4().hex}", function=function)


def _literal(text: str) -> str:
    """A string of Lark's, whose escapes are those of JSON."""
    return json.dumps(text)


FORMATS = (
    # Qwen, SmolLM, Hermes
    ToolFormat("<tool_call>", "<tool_call>", "<tool_call>", "</tool_call>", "arguments"),
    # Llama 3
    ToolFormat('{"name": function name, "parameters"', '{"name"', "", "", "parameters"),
)


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template asks for; None where it takes no tools or is unknown."""
    if "tools" not in template:
        return None
    return next((known for known in FORMATS if known.hint in template), None)

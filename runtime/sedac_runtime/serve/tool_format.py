"""Tool calls, as the chat templates of model families have them."""

import json
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from sedac_runtime._core import InputError
from sedac_runtime.serve.chat_request import FunctionDefinition
from sedac_runtime.serve.constraint import schema_text
from sedac_runtime.serve.response_bodies import CalledFunction, MadeToolCall

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


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

    def parse(self, text: str, names: Collection[str]) -> list[MadeToolCall] | None:
        """The calls in `text`, which begins with `opening`; None where it holds anything else.

        names: of the functions that there are. Where calls have no `start`, only objects with one
        of these are calls.
        """
        parts = text.split(self.start) if self.start else [text]
        written = [part.partition(self.end)[0] if self.end else part for part in parts]
        calls = [self._call(part) for part in written if part.strip()]
        if not (calls and all(calls)):
            return None
        made = [call for call in calls if call]
        known = bool(self.start) or all(call.function.name in names for call in made)
        return made if known else None

    def grammar(
        self, functions: list[FunctionDefinition], answer: dict[str, Any] | None = None
    ) -> str:
        """One call of any of `functions`, or JSON that conforms to the schema `answer`, in
        llguidance's variant of Lark. Raises InputError where the two cannot be told apart.

        Each schema is a grammar by itself: its references are relative to its root.
        """
        if answer is not None and not self.start:
            raise InputError(
                "calls of this model look like answers in JSON; leave response_format out, or say"
                " by tool_choice whether a tool is called"
            )
        before = _literal(self.start + "\n") + " " if self.start else ""
        after = " " + _literal("\n" + self.end) if self.end else ""
        names = " | ".join(f"call_{index}" for index in range(len(functions)))
        rules = [f"called: {before}call{after}", f"call: {names}"]
        if answer is None:
            rules.append("start: called")
        else:
            rules += ["start: called | answer", f"answer: %json {schema_text(answer)}"]
        for index, function in enumerate(functions):
            name = json.dumps(function.name)
            schema = schema_text(function.parameters or _NO_ARGUMENTS)
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
        if _has_surrogate(call["name"] + text):
            return None
        function = CalledFunction(name=call["name"], arguments=text)
        return MadeToolCall(id=f"call_{uuid.uuid4().hex}", function=function)


def _has_surrogate(text: str) -> bool:
    """Whether there is half a character in `text`, as escapes of JSON can write it."""
    return any("\ud800" <= character <= "\udfff" for character in text)


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

"""Tool calls of model families."""

import json

import pytest
from llguidance import LLMatcher

from sedac_runtime import InputError
from sedac_runtime.serve.chat_request import FunctionDefinition
from sedac_runtime.serve.chat_routes import Message
from sedac_runtime.serve.choice_text import ChoiceUpdate
from sedac_runtime.serve.constraint import lark_grammar
from sedac_runtime.serve.response_bodies import MadeToolCall
from sedac_runtime.serve.tool_format import FORMATS, ToolFormat, tool_format
from serve.byte_grammar import admits

HERMES, LLAMA = FORMATS
WEATHER = FunctionDefinition(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}},
        "required": ["city"],
        "$defs": {"city": {"type": "string", "maxLength": 20}},
    },
)
TIME = FunctionDefinition(name="time")
NAMES = {"weather", "time"}


def called(calls: list[MadeToolCall] | None) -> list[tuple[str, object]] | None:
    return calls and [(call.function.name, json.loads(call.function.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("family", "text", "calls"),
    [
        (
            HERMES,
            '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>',
            [("time", {}), ("weather", {"city": "Bern"})],
        ),
        (HERMES, '<tool_call>{"name": "time"}', [("time", {})]),
        (HERMES, "<tool_call>time()</tool_call>", None),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>', None),
        (HERMES, "<tool_call></tool_call>", None),
        (HERMES, "<tool_call>" + "[" * 100_000, None),
        (HERMES, '<tool_call>{"name": "moon"}</tool_call>', [("moon", {})]),
        (HERMES, r'<tool_call>{"name": "\ud800"}</tool_call>', None),
        (HERMES, r'<tool_call>{"name": "time", "arguments": "\udfff"}</tool_call>', None),
        (
            LLAMA,
            '{"name": "weather", "parameters": {"city": "Bern"}}',
            [("weather", {"city": "Bern"})],
        ),
        (LLAMA, '{"name": "weather", "param', None),
        # an answer in JSON
        (LLAMA, '{"name": "Ada", "age": 36}', None),
    ],
)
def test_calls_are_read(
    family: ToolFormat, text: str, calls: list[tuple[str, object]] | None
) -> None:
    assert called(family.parse(text, NAMES)) == calls


def test_calls_have_ids_of_their_own() -> None:
    call = '<tool_call>{"name": "time"}</tool_call>'
    calls = HERMES.parse(call + call, NAMES)
    assert calls is not None
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize("family", FORMATS)
def test_grammars_are_accepted_and_name_every_function(family: ToolFormat) -> None:
    grammar = family.grammar([WEATHER, TIME])
    assert "weather" in grammar
    assert "time" in grammar
    assert LLMatcher.validate_grammar(lark_grammar(grammar)) == ""


def call_of(family: ToolFormat, name: str, arguments: str) -> str:
    call = f'{{"name": "{name}", "{family.arguments}": {arguments}}}'
    return f"{family.start}\n{call}\n{family.end}" if family.start else call


@pytest.mark.parametrize("family", FORMATS)
def test_a_function_without_parameters_is_called_without_arguments(family: ToolFormat) -> None:
    grammar = lark_grammar(family.grammar([TIME]))
    assert admits(grammar, call_of(family, "time", "{}"))
    assert not admits(grammar, call_of(family, "time", '{"zone": 1}'))


def test_an_answer_may_come_instead_of_a_call() -> None:
    answer = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    grammar = lark_grammar(HERMES.grammar([WEATHER], answer))
    assert admits(grammar, call_of(HERMES, "weather", '{"city": "Bern"}'))
    assert admits(grammar, '{"name": "Ada"}')
    assert not admits(grammar, "[]")
    assert not admits(lark_grammar(HERMES.grammar([WEATHER])), '{"name": "Ada"}')
    with pytest.raises(InputError, match="tool_choice"):
        LLAMA.grammar([WEATHER], answer)


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ('{% if tools %}{"name": function name, "parameters": dictionary}{% endif %}', LLAMA),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", None),
        ("<tool_call>", None),
    ],
)
def test_templates_tell_their_family(template: str, family: ToolFormat | None) -> None:
    assert tool_format(template) is family


@pytest.mark.parametrize(("most_calls", "count"), [(None, 2), (1, 1)])
def test_calls_that_are_not_to_be_parallel_are_one(most_calls: int | None, count: int) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    message = Message(HERMES, {"f"}, most_calls)
    text, calls = message.push(ChoiceUpdate(text=f"Well. {call}{call}", finish_reason="stop"))
    assert (text, len(calls)) == ("Well. ", count)

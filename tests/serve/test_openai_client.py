"""OpenAI's client, unchanged, against a server."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion

from sedac_runtime import SedacModel
from serve.running_server import RunningServer

PROMPT = "class Stack:\n    def push(self, item):\n"
GREEDY: dict[str, Any] = {"model": "chat", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
HELLO: list[Any] = [
    {"role": "developer", "content": "Answer in Python."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "def main"}, {"type": "text", "text": "():"}],
    },
]
CHAT: dict[str, Any] = {"model": "chat", "messages": HELLO, "temperature": 0, "max_tokens": 24}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "night": {"type": "boolean"}},
    "required": ["city", "night"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(chat_bundle: Path) -> SedacModel:
    return SedacModel.from_pretrained(chat_bundle)


def text_of(completion: Completion) -> str:
    return completion.choices[0].text


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["chat", "bundle"]
    entry = client.models.retrieve("bundle")
    assert entry.model_extra is not None
    facts = entry.model_extra["sedac"]
    assert facts["num_layers"] == 12
    assert (facts["chat"], facts["policy"], facts["device"]) == (False, "stability", "cpu")


def test_a_completion_is_what_generate_gives(client: OpenAI, model: SedacModel) -> None:
    expected = model.generate(PROMPT, mode="full", max_new_tokens=24)
    completion = client.completions.create(**GREEDY)
    assert text_of(completion) == expected.text
    assert completion.choices[0].finish_reason == expected.finish_reason
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == expected.prompt_tokens
    assert completion.usage.completion_tokens == len(expected.tokens)


@pytest.mark.parametrize("mode", ["full", "lossless", "exit"])
def test_sampled_texts_are_those_of_generate(client: OpenAI, model: SedacModel, mode: Any) -> None:
    settings: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    options = {"mode": mode, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    expected = model.generate(PROMPT, max_new_tokens=24, **settings, **options)  # type: ignore[arg-type]
    completion = client.completions.create(**GREEDY | settings, extra_body={"sedac": options})
    assert text_of(completion) == expected.text
    sedac = completion.choices[0].model_extra["sedac"]  # type: ignore[index]
    assert [token["exit_layer"] for token in sedac["tokens"]] == expected.exit_layers
    assert [token["id"] for token in sedac["tokens"]] == expected.tokens
    assert "".join(token["text"] for token in sedac["tokens"]) == expected.text
    assert sedac["summary"]["mode"] == mode
    assert sedac["summary"]["mean_exit_layer"] == pytest.approx(expected.mean_exit_layer)


def test_a_stream_is_the_completion_in_pieces(client: OpenAI) -> None:
    whole = client.completions.create(**GREEDY)
    pieces = list(
        client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    )
    *texts, usage = pieces
    assert "".join(text_of(piece) for piece in texts) == text_of(whole)
    assert [piece.choices[0].finish_reason for piece in texts][-1] == "length"
    assert usage.choices == []
    # what of the prompt a cache held differs: the whole was there before the pieces
    for counts in (usage.usage, whole.usage):
        assert counts is not None
        counts.prompt_tokens_details = None
    assert usage.usage == whole.usage
    assert all(piece.usage is None for piece in texts)


def test_accepted_drafts_are_reported(client: OpenAI) -> None:
    # a text that repeats itself
    request = GREEDY | {"prompt": "x = 1\n" * 30, "max_tokens": 40}
    options = {"drafter": "prompt-lookup"}
    completion = client.completions.create(**request, extra_body={"sedac": options})
    sedac = completion.choices[0].model_extra["sedac"]  # type: ignore[index]
    drafted = [token for token in sedac["tokens"] if token["drafted"]]
    assert len(drafted) == sedac["summary"]["accepted"] <= sedac["summary"]["drafted"]
    # also of a text that goes on
    stopped = client.completions.create(
        **request | {"max_tokens": 60, "stop": text_of(completion)}, extra_body={"sedac": options}
    )
    assert stopped.choices[0].finish_reason == "stop"
    summary = stopped.choices[0].model_extra["sedac"]["summary"]  # type: ignore[index]
    assert len(drafted) <= summary["accepted"] <= summary["drafted"]


def test_prompts_may_be_several_and_tokens(client: OpenAI, model: SedacModel) -> None:
    both = client.completions.create(**GREEDY | {"prompt": [PROMPT, "import "], "n": 2})
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert (
        both.choices[0].text == both.choices[1].text == text_of(client.completions.create(**GREEDY))
    )
    tokens = model.encode(PROMPT)
    of_tokens = client.completions.create(**GREEDY | {"prompt": tokens})
    assert of_tokens.choices[0].text == both.choices[0].text
    listed = client.completions.create(**GREEDY | {"prompt": [tokens]})
    assert listed.choices[0].text == both.choices[0].text


def test_choices_are_drawn_apart(client: OpenAI) -> None:
    request = GREEDY | {"temperature": 1.0, "n": 3, "seed": 5}
    texts = [choice.text for choice in client.completions.create(**request).choices]
    assert len(set(texts)) > 1
    again = client.completions.create(**request | {"n": 1, "seed": 6})
    assert text_of(again) == texts[1]
    for seed in (6 + 2**64, 6 - 2**64):
        assert text_of(client.completions.create(**request | {"n": 1, "seed": seed})) == texts[1]


def test_without_a_seed_texts_differ(client: OpenAI) -> None:
    request = GREEDY | {"temperature": 1.5}
    assert len({text_of(client.completions.create(**request)) for _ in range(4)}) > 1
    of_one_request = client.completions.create(**request | {"prompt": [PROMPT] * 4})
    assert len({choice.text for choice in of_one_request.choices}) > 1


def test_echo_repeats_the_prompt(client: OpenAI) -> None:
    whole = text_of(client.completions.create(**GREEDY, echo=True))
    assert whole == PROMPT + text_of(client.completions.create(**GREEDY))
    stream = client.completions.create(**GREEDY, echo=True, stream=True)
    assert "".join(text_of(piece) for piece in stream) == whole


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    whole = text_of(client.completions.create(**GREEDY))
    stop = whole[9:12]
    request = GREEDY | {"stop": [stop, "never in it"]}
    stopped = client.completions.create(**request)
    assert text_of(stopped) == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    stream = client.completions.create(**request, stream=True)
    assert "".join(text_of(piece) for piece in stream) == text_of(stopped)


def test_a_stop_string_may_be_what_no_token_completes(client: OpenAI, model: SedacModel) -> None:
    half, *_ = model.encode("\u00e9")
    request = GREEDY | {"max_tokens": 1, "logit_bias": {str(half): 100}}
    assert text_of(client.completions.create(**request)) == "\N{REPLACEMENT CHARACTER}"
    stopped = client.completions.create(**request, stop="\N{REPLACEMENT CHARACTER}")
    assert (text_of(stopped), stopped.choices[0].finish_reason) == ("", "stop")


def test_logprobs_of_a_completion(client: OpenAI) -> None:
    completion = client.completions.create(**GREEDY, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == text_of(completion)
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    for own, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        # greedy
        assert own == pytest.approx(max(top.values()), abs=1e-4)
        assert own <= 0
        assert len(top) <= 2


@pytest.mark.parametrize("count", [0, 1])
def test_the_logprobs_of_a_completion_have_its_own_tokens(
    client: OpenAI, model: SedacModel, count: int
) -> None:
    (improbable,) = model.encode("z")
    completion = client.completions.create(
        **GREEDY | {"max_tokens": 1}, logprobs=count, logit_bias={str(improbable): 100}
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs and logprobs.token_logprobs
    assert logprobs.top_logprobs[0]["z"] == logprobs.token_logprobs[0]
    assert len(logprobs.top_logprobs[0]) == count + 1


def test_logprobs_of_a_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    text = b"".join(bytes(token.bytes or []) for token in content).decode()
    assert text == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.top_logprobs[0].token == token.token for token in content)
    plain = client.chat.completions.create(**CHAT, logprobs=True)
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.content is not None
    assert all(token.top_logprobs == [] for token in plain.choices[0].logprobs.content)


def test_a_bias_forbids_and_forces_tokens(client: OpenAI, model: SedacModel) -> None:
    (token,) = model.encode("z")
    forced = client.completions.create(**GREEDY | {"max_tokens": 3}, logit_bias={str(token): 100})
    assert text_of(forced) == "zzz"
    first = model.encode(text_of(client.completions.create(**GREEDY | {"max_tokens": 1})))
    forbidden = client.completions.create(
        **GREEDY | {"max_tokens": 1}, logit_bias={str(first[0]): -100}
    )
    assert model.encode(text_of(forbidden)) != first


def test_a_chat_is_its_template(client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT)
    prompt = "\n# system: Answer in Python.\n\n# user: def main():\n\n\n# assistant:\n"
    assert answer.usage is not None
    of_prompt = client.completions.create(**GREEDY | {"prompt": prompt})
    assert answer.choices[0].message.role == "assistant"
    assert isinstance(answer.choices[0].message.content, str)
    assert of_prompt.usage is not None


def test_a_chat_streams(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    options: Any = {"stream_options": {"include_usage": True}, "extra_body": {"sedac": {}}}
    *chunks, usage = client.chat.completions.create(**CHAT, stream=True, **options)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    # what of the prompt a cache held differs: the whole was there before the pieces
    for counts in (usage.usage, whole.usage):
        assert counts is not None
        counts.prompt_tokens_details = None
    assert usage.usage == whole.usage
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].choices[0].model_extra["sedac"]["summary"]["num_layers"] == 12  # type: ignore[index]


def test_the_clients_own_stream_helper_works(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT).choices[0].message.content
    assert whole is not None
    # it raises where a text is cut off
    with client.chat.completions.stream(**CHAT, stop=whole[-3:]) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in events
    assert final.choices[0].message.content == whole[: whole.index(whole[-3:])]


def test_an_answer_may_be_any_json_object(client: OpenAI) -> None:
    request = CHAT | {"max_tokens": 200, "temperature": 1.0, "seed": 3}
    answer = client.chat.completions.create(**request, response_format={"type": "json_object"})
    text = answer.choices[0].message.content
    assert text is not None
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_follows_a_schema(client: OpenAI, seed: int) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    request = CHAT | {"max_tokens": 100, "temperature": 1.0, "seed": seed, "n": 2}
    answer = client.chat.completions.create(**request, response_format=schema)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        parsed = json.loads(choice.message.content or "")
        assert parsed["city"] in ("Bern", "Rome")
        assert isinstance(parsed["night"], bool)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_tool_is_called_when_it_must_be(client: OpenAI, choice: Any) -> None:
    request = CHAT | {"max_tokens": 100}
    answer = client.chat.completions.create(**request, tools=[WEATHER], tool_choice=choice)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
    # the conversation goes on
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages: Any = [*HELLO, answer.choices[0].message, result]
    client.chat.completions.create(**CHAT | {"messages": messages}, tools=[WEATHER])


def test_tool_calls_stream(client: OpenAI) -> None:
    request = CHAT | {"max_tokens": 100}
    chunks = list(
        client.chat.completions.create(
            **request, tools=[WEATHER], tool_choice="required", stream=True
        )
    )
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.index for call in calls] == [0]
    assert calls[0].function is not None
    assert calls[0].function.name == "weather"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_tool_may_be_called_where_answers_have_a_schema(
    client: OpenAI, model: SedacModel
) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    request = CHAT | {"max_tokens": 100, "tools": [WEATHER], "response_format": schema}
    # what a call begins with, and an answer
    for text, reason in (("<", "tool_calls"), ("{", "stop")):
        (token,) = model.encode(text)
        (choice,) = client.chat.completions.create(**request, logit_bias={str(token): 50}).choices
        assert choice.finish_reason == reason


def test_tools_that_are_not_called_change_nothing_else(client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, tools=[WEATHER], tool_choice="none")
    assert answer == client.chat.completions.create(**CHAT).model_copy(
        update={"id": answer.id, "created": answer.created}
    )


def test_many_at_once_get_the_texts_of_each_alone(server: RunningServer, client: OpenAI) -> None:
    requests = [
        GREEDY | {"prompt": PROMPT[: 10 + index], "temperature": index % 2, "seed": index}
        for index in range(16)
    ]
    alone = [text_of(client.completions.create(**request)) for request in requests]

    async def together() -> list[Completion]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as many:
            tasks = [many.completions.create(**request) for request in requests]
            return await asyncio.gather(*tasks)

    assert [text_of(completion) for completion in asyncio.run(together())] == alone

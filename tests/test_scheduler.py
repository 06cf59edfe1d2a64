"""Sequences that are generated together, through the binding."""

import select
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import THREADS

from sedac_runtime import InputError, SedacModel
from sedac_runtime._core import (
    DecodingSetting,
    Model,
    Progress,
    Sampling,
    Scheduler,
    StepThread,
)

PROMPTS = [[1, 2, 3, 4], [5, 6], [1, 2, 3, 9, 10, 11, 12], list(range(1, 60))]
NEW_TOKENS = 12
SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tiny_bundle: Callable[[str], tuple[object, Path]]) -> Model:
    _, bundle = tiny_bundle("llama")
    return SedacModel.from_pretrained(bundle, threads=THREADS)._core


def run(scheduler: Scheduler) -> dict[int, list[Progress]]:
    """Step until nothing is left."""
    progress: dict[int, list[Progress]] = {}
    while True:
        for each in scheduler.step():
            progress.setdefault(each.sequence, []).append(each)
        statistics = scheduler.statistics()
        if statistics.running + statistics.waiting == 0:
            return progress


def take(thread: StepThread) -> list[Progress]:
    """Wait until there is something to take."""
    ready, _, _ = select.select([thread], [], [], SECONDS)
    assert ready, "nothing comes"
    return thread.take()


def tokens(progress: list[Progress]) -> list[int]:
    return [token.id for each in progress for token in each.tokens]


def add(scheduler: Scheduler, model: Model, prompt: list[int], **settings: object) -> int:
    keywords = {"max_new_tokens": NEW_TOKENS, "stop_tokens": [], **settings}
    return scheduler.add(prompt, model.decoding("full"), Sampling(), **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["full", "exit", "lossless"])
def test_tokens_are_those_of_generate(model: Model, mode: str) -> None:
    decoding: DecodingSetting = model.decoding(mode, drafter="none" if mode == "exit" else None)  # type: ignore[arg-type]
    sampling = Sampling(temperature=0.8, seed=4)
    # whole prompts, as in a generation: chunks may round differently
    scheduler = Scheduler(model, max_sequences=3, prefill_chunk=256)
    settings = {"max_new_tokens": NEW_TOKENS, "stop_tokens": []}
    numbers = [scheduler.add(prompt, decoding, sampling, **settings) for prompt in PROMPTS]  # type: ignore[arg-type]
    progress = run(scheduler)
    for prompt, number in zip(PROMPTS, numbers, strict=True):
        alone = model.generate(prompt, decoding, sampling, **settings)  # type: ignore[arg-type]
        if progress[number][0].cached_prompt_tokens == 0:
            expected = [(token.id, token.exit_layer, token.exit_reason) for token in alone]
            ours = [token for each in progress[number] for token in each.tokens]
            assert [(t.id, t.exit_layer, t.exit_reason) for t in ours] == expected
        *steps, last = progress[number]
        assert all(step.finish_reason is None for step in steps)
        assert (last.finish_reason, last.error) == ("length", None)


def test_a_conversation_continues_its_cache(model: Model) -> None:
    scheduler = Scheduler(model, max_sequences=2)
    first = add(scheduler, model, PROMPTS[0])
    answered = PROMPTS[0] + tokens(run(scheduler)[first])
    second = add(scheduler, model, [*answered, 7])
    assert run(scheduler)[second][0].cached_prompt_tokens == len(answered) - 1
    statistics = scheduler.statistics()
    assert (statistics.prefix_hits, statistics.prefix_tokens) == (1, len(answered) - 1)
    assert 0 < statistics.used_cache_tokens <= statistics.cache_tokens


def test_prompts_are_scored_in_every_mode(model: Model) -> None:
    scheduler = Scheduler(model, max_sequences=1)
    keywords = {"max_new_tokens": 2, "stop_tokens": [], "prompt_logprobs": True}
    scored = []
    for mode in ("full", "exit", "lossless"):
        decoding = model.decoding(mode)  # type: ignore[arg-type]
        number = scheduler.add(PROMPTS[3], decoding, Sampling(), top_logprobs=2, **keywords)  # type: ignore[arg-type]
        steps = run(scheduler)[number]
        assert all(len(step.prompt_logprobs) <= 16 for step in steps)
        scored.append([entry for step in steps for entry in step.prompt_logprobs])
        assert len(tokens(steps)) == 2
    assert len(scored[0]) == len(PROMPTS[3]) - 1
    assert scored[0] == scored[1] == scored[2]
    for logprob, most_probable in scored[0]:
        assert logprob <= most_probable[0][1] and len(most_probable) == 2
    with pytest.raises(InputError, match="prompt_logprobs"):
        scheduler.add(PROMPTS[0], decoding, Sampling(), **keywords)  # type: ignore[arg-type]


def test_logprobs_and_bias(model: Model) -> None:
    scheduler = Scheduler(model, max_sequences=2)
    plain = add(scheduler, model, PROMPTS[0], top_logprobs=3)
    biased = add(scheduler, model, PROMPTS[0], logit_bias={7: 1000.0}, top_logprobs=0)
    progress = run(scheduler)
    for each in progress[plain]:
        for token in each.tokens:
            assert token.top_logprobs[0] == (token.id, token.logprob)
            logprobs = [logprob for _, logprob in token.top_logprobs]
            assert len(logprobs) == 3 and sorted(logprobs, reverse=True) == logprobs
    assert set(tokens(progress[biased])) == {7}
    (token,) = progress[biased][0].tokens
    assert token.top_logprobs == [] and token.logprob is not None and token.logprob < 0
    with pytest.raises(InputError, match="logit_bias"):
        add(scheduler, model, PROMPTS[0], logit_bias={10**6: 1.0})


@pytest.mark.parametrize(
    "mask_of",
    [
        lambda token: struct.pack("<2I", *(1 << token & 0xFFFFFFFF, 1 << token >> 32)),
        lambda token: np.array([1 << token & 0xFFFFFFFF, 1 << token >> 32], np.uint32),
    ],
)
def test_a_constrained_sequence_waits(model: Model, mask_of: Callable[[int], bytes]) -> None:
    scheduler = Scheduler(model, max_sequences=2)
    number = add(scheduler, model, PROMPTS[1], constrained=True, max_new_tokens=3)
    given: list[int] = []
    for token in [3, 40, 31]:
        assert scheduler.step() == []
        scheduler.allow({number: mask_of(token)})
        (progress,) = scheduler.step()
        given.extend(token.id for token in progress.tokens)
    assert given == [3, 40, 31]
    for mask, match in [(b"\0" * 8, "mask"), (b"\1" * 3, "3 bytes")]:
        with pytest.raises(InputError, match=match):
            scheduler.allow({number: mask})


def test_a_thread_steps_until_it_is_stopped(model: Model) -> None:
    scheduler = Scheduler(model, max_sequences=3)
    thread = scheduler.start()
    assert thread.take() == []
    for prompt in PROMPTS[:2]:
        number, seen = add(scheduler, model, prompt), []
        while not seen or seen[-1].finish_reason is None:
            seen += take(thread)
        assert {progress.sequence for progress in seen} == {number}
        assert all(progress.waited > 0 for progress in seen)
        alone = model.generate(
            prompt, model.decoding("full"), Sampling(), max_new_tokens=NEW_TOKENS, stop_tokens=[]
        )
        assert tokens(seen) == [token.id for token in alone]
        assert select.select([thread], [], [], 0)[0] == []
    thread.stop()
    add(scheduler, model, PROMPTS[0])
    assert take(thread) == [], "a stopped thread can be read, and has nothing"
    assert scheduler.statistics().waiting == 1


def test_a_generation_has_its_turn_beside_a_thread(model: Model) -> None:
    # steps without tokens, so that the thread never waits for who takes them
    scheduler = Scheduler(model, max_sequences=1, prefill_chunk=1)
    thread = scheduler.start()
    for first in range(200):
        add(scheduler, model, [first % 50 + 1, *range(1, 50)], max_new_tokens=1)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if select.select([thread], [], [], 0.01)[0]:
                thread.take()

    reader = threading.Thread(target=read)
    reader.start()
    generation = model.generate(
        PROMPTS[0], model.decoding("full"), Sampling(), max_new_tokens=4, stop_tokens=[]
    )
    assert len(list(generation)) == 4
    assert scheduler.statistics().waiting > 150, "it waited for the sequences"
    done.set()
    reader.join()
    thread.stop()


def test_other_threads_add_and_cancel(model: Model) -> None:
    scheduler = Scheduler(model, max_sequences=2)
    kept: list[int] = []

    def visit() -> None:
        for _ in range(5):
            kept.append(add(scheduler, model, PROMPTS[1]))
            scheduler.cancel(add(scheduler, model, PROMPTS[0]))

    threads = [threading.Thread(target=visit) for _ in range(3)]
    for thread in threads:
        thread.start()
    progress: dict[int, list[Progress]] = {}
    while any(thread.is_alive() for thread in threads):
        for each in scheduler.step():
            progress.setdefault(each.sequence, []).append(each)
    for number, more in run(scheduler).items():
        progress.setdefault(number, []).extend(more)
    assert {number for number, steps in progress.items() if steps[-1].finish_reason} >= set(kept)
    assert all(len(tokens(progress[number])) == NEW_TOKENS for number in kept)


def test_eight_run_at_once_where_nobody_says_how_many(model: Model) -> None:
    assert Scheduler(model, max_sequences=2).max_sequences == 2
    scheduler = Scheduler(model)
    assert scheduler.max_sequences == 8
    for _ in range(9):
        add(scheduler, model, PROMPTS[1])
    scheduler.step()
    statistics = scheduler.statistics()
    assert (statistics.running, statistics.waiting) == (8, 1)
    run(scheduler)


def test_wrong_settings_are_refused(model: Model) -> None:
    scheduler = Scheduler(model, max_sequences=1, cache_tokens=8)
    with pytest.raises(InputError, match="longer than the cache"):
        add(scheduler, model, PROMPTS[3])
    with pytest.raises(InputError, match="max_sequences"):
        Scheduler(model, max_sequences=0)
    with pytest.raises(InputError, match="prefill_chunk"):
        Scheduler(model, max_sequences=1, prefill_chunk=0)


def test_drafts_beside_prompts_change_no_text(model: Model) -> None:
    """Texts that repeat themselves are drafted while a longer prompt is prefilled beside."""
    settings: dict[str, object] = {"max_new_tokens": 40, "stop_tokens": []}
    prompts = [PROMPTS[0] * 5, PROMPTS[1] * 8, PROMPTS[3] * 2]
    decoding = model.decoding("lossless", drafter="prompt-lookup")
    scheduler = Scheduler(model, max_sequences=3, prefill_chunk=24)
    numbers = [scheduler.add(prompt, decoding, Sampling(), **settings) for prompt in prompts]  # type: ignore[arg-type]
    progress = run(scheduler)
    for prompt, number in zip(prompts, numbers, strict=True):
        alone = model.generate(prompt, model.decoding("full"), Sampling(), **settings)  # type: ignore[arg-type]
        assert tokens(progress[number]) == [token.id for token in alone]
    for number in numbers:
        for step in progress[number]:
            assert step.drafts.accepted == sum(token.drafted for token in step.tokens)
    assert any(step.drafts.drafted > 0 for number in numbers for step in progress[number])

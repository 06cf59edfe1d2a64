"""Streams: closed, left, dropped, shared by threads, inherited by a fork."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import THREADS

from sedac_runtime import SedacModel
from sedac_runtime.model import GenerationStream, TokenOutput

PROMPT = [1, 2, 3, 4]
TOKENS = 200  # more than a stream is ahead of its reader


@pytest.fixture(scope="module")
def model(tiny_bundle: Callable[[str], tuple[object, Path]]) -> SedacModel:
    _, bundle = tiny_bundle("llama")
    return SedacModel.from_pretrained(bundle, threads=THREADS)


def start(model: SedacModel) -> GenerationStream:
    return model.stream(PROMPT, mode="full", max_new_tokens=TOKENS, stop_tokens=[])


def generations() -> int:
    """Generations of this process that are under way."""
    names = []
    for file in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(file.read_text().strip())
        except OSError:  # a thread that ended meanwhile
            continue
    return names.count("sedac-generate")


def assert_free(model: SedacModel) -> None:
    """The generation ends by itself, though nobody reads it."""
    deadline = time.monotonic() + 60
    while generations():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(model.generate(PROMPT, max_new_tokens=2, stop_tokens=[]).tokens) == 2


def test_a_stream_waits_for_its_reader(model: SedacModel) -> None:
    stream = start(model)
    assert generations() == 0
    tokens = iter(stream)
    next(tokens)
    time.sleep(1)  # all tokens would take a tenth of it
    assert generations() == 1
    assert len(list(tokens)) == TOKENS - 1
    assert_free(model)


def test_closing_ends_a_stream(model: SedacModel) -> None:
    with start(model) as stream:
        tokens = iter(stream)
        next(tokens)
    assert list(tokens) == []
    with pytest.raises(RuntimeError, match="closed"):
        _ = stream.output
    assert_free(model)


def test_leaving_the_loop_closes_a_stream(model: SedacModel) -> None:
    stream = start(model)
    for _ in stream:
        break
    with pytest.raises(RuntimeError, match="closed"):
        _ = stream.output
    assert_free(model)


def test_a_dropped_stream_frees_the_model(model: SedacModel) -> None:
    stream = start(model)._generation
    next(stream)
    assert generations() == 1
    del stream
    assert_free(model)


def test_closing_what_never_began_or_is_over_does_nothing(model: SedacModel) -> None:
    stream = start(model)
    stream.close()
    assert list(stream) == []
    with start(model) as stream:
        output = stream.output
    assert stream.output is output
    assert len(output.tokens) == TOKENS


def test_generations_of_one_model_take_turns(model: SedacModel) -> None:
    expected = start(model).output.tokens
    first, second = start(model), start(model)
    pairs = list(zip(first, second, strict=True))
    assert [(a.id, b.id) for a, b in pairs] == list(zip(expected, expected, strict=True))


def test_threads_that_read_one_stream_take_turns(model: SedacModel) -> None:
    stream = start(model)
    read: list[list[TokenOutput]] = [[], [], []]
    threads = [threading.Thread(target=lambda to=to: to.extend(stream)) for to in read]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stream.output.tokens) == TOKENS
    assert sorted(t.id for part in read for t in part) == sorted(stream.output.tokens)
    assert stream.output.tokens == start(model).output.tokens


def test_a_stream_is_closed_while_another_thread_reads_it(model: SedacModel) -> None:
    stream = start(model)
    thread = threading.Thread(target=lambda: [time.sleep(0.01) for _ in stream])
    thread.start()
    stream.close()
    thread.join()
    assert_free(model)


def test_encoding_lets_other_threads_run(demo_model: SedacModel) -> None:
    text = "def push(self, item):\n" * 20_000
    thread = threading.Thread(target=lambda: demo_model.encode(text))
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 10


FORK = """
import os, signal, sys, threading
from sedac_runtime import EngineError, SedacModel
from sedac_runtime._core import Scheduler

bundle = sys.argv[1]
model = SedacModel.from_pretrained(bundle, threads=2)
stream = model.stream([1, 2, 3], mode="full", max_new_tokens=200, stop_tokens=[])
reader = threading.Thread(target=lambda: list(stream))
reader.start()
scheduler = Scheduler(model.core, max_sequences=1)
steps = scheduler.start()
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    reader.join()
    assert len(stream.output.tokens) == 200
    sys.exit(os.waitstatus_to_exitcode(status))
signal.alarm(30)  # ends a child that hangs
for attempt in (
    lambda: list(stream),
    lambda: model.generate([1], max_new_tokens=2),
    lambda: model.follow([1, 2]),
    lambda: SedacModel.from_pretrained(bundle, threads=2),
    lambda: scheduler.start(),
    lambda: steps.take(),
    lambda: steps.stop(),
):
    try:
        attempt()
    except EngineError as error:
        print(error)
stream.close()
del attempt, stream, model, reader, scheduler, steps
"""


def test_a_forked_process_is_refused(tiny_bundle: Callable[[str], tuple[object, Path]]) -> None:
    _, bundle = tiny_bundle("llama")
    run = subprocess.run([sys.executable, "-c", FORK, bundle], capture_output=True, text=True)
    assert run.returncode == 0, run
    lines = run.stdout.splitlines()
    assert len(lines) == 7, run
    assert all("forked" in line and "spawn" in line for line in lines), run

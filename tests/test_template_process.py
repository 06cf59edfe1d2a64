"""The process that renders a chat template: what is shared, what is limited, and its end."""

import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from process_tree import children, has_ended, renderers

from sedac_runtime import rendering, template_process
from sedac_runtime.template_process import TemplateProcess

SECONDS = 30
# a loop of a given number of thousands of steps, of which some take too long
LOOP = "{% for a in range(steps) %}{% for b in range(1000) %}{% endfor %}{% endfor %}done"
ENDLESS = 99_999


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    """Renders LOOP; no other process of these tests does."""
    gc.collect()
    assert not renderers(os.getpid())
    process = TemplateProcess(LOOP)
    yield process
    process.start().end()


def run(process: TemplateProcess, steps: int) -> dict[str, str]:
    return process.render(json.dumps({"steps": steps}))


def the_only(pids: set[int]) -> int:
    (pid,) = pids
    return pid


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)


@contextmanager
def in_progress(process: TemplateProcess) -> Iterator[tuple[Future[dict[str, str]], int, int]]:
    """A rendering in progress: its answer, the process that supervises it, and its own."""
    interpreter = the_only(renderers(os.getpid()))
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(run, process, ENDLESS)
        wait_for(lambda: len(children(interpreter)) == 1)
        supervisor = the_only(children(interpreter))
        wait_for(lambda: len(children(supervisor)) == 1)
        yield answer, supervisor, the_only(children(supervisor))


def test_each_rendering_has_a_process_that_ends_with_it(process: TemplateProcess) -> None:
    process.start()
    clock_ends = time.monotonic() + rendering.SECONDS + 1
    interpreter = the_only(renderers(os.getpid()))
    used = set()
    for _ in range(2):
        with in_progress(process) as (answer, *pids):
            used |= set(pids)
            # others do not wait for it
            assert run(process, 1) == {"text": "done"}
            assert not answer.done()
            assert "longer than" in answer.result()["error"]
        wait_for(lambda: not children(interpreter))
    assert len(used) == 4
    # the clock that it had while it compiled has been stopped
    time.sleep(max(0, clock_ends - time.monotonic()))
    assert run(process, 1) == {"text": "done"}
    assert renderers(os.getpid()) == {interpreter}


def test_a_rendering_holds_no_connection_of_others(process: TemplateProcess) -> None:
    """Nor the socket through which they come."""
    process.start()
    with in_progress(process) as (_, supervisor, own):
        for pid in (supervisor, own):
            files = [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]
            assert sum(file.startswith("socket:") for file in files) == 1
        os.kill(own, signal.SIGKILL)


def test_few_render_at_once(process: TemplateProcess) -> None:
    process.start()
    interpreter = the_only(renderers(os.getpid()))
    most = 0
    with ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(run, process, 2000) for _ in range(32)]
        while not all(answer.done() for answer in answers):
            most = max(most, len(children(interpreter)))
    assert {answer.result()["text"] for answer in answers} == {"done"}
    assert 1 < most <= 6  # some that have answered are about to end


def test_a_rendering_that_is_killed_is_an_error(process: TemplateProcess) -> None:
    process.start()
    for index in (0, 1):
        with in_progress(process) as (answer, *pids):
            os.kill(pids[index], signal.SIGKILL)
            if index == 0:
                os.kill(pids[1], signal.SIGKILL)
            assert answer.result() == {"error": "its interpreter ends with code -9"}


def test_a_process_that_was_killed_is_replaced(process: TemplateProcess) -> None:
    assert run(process, 1) == {"text": "done"}
    killed = the_only(renderers(os.getpid()))
    os.kill(killed, signal.SIGKILL)
    wait_for(partial(has_ended, killed))
    assert run(process, 1) == {"text": "done"}
    assert the_only(renderers(os.getpid())) != killed


def test_a_process_that_hangs_is_killed_and_replaced(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.start()
    hanging = the_only(renderers(os.getpid()))
    monkeypatch.setattr(template_process, "_SECONDS", 0.2)
    with in_progress(process) as (answer, *pids):
        os.kill(pids[1], signal.SIGSTOP)
        assert "longer than" in answer.result()["error"]
    for pid in (hanging, *pids):
        wait_for(partial(has_ended, pid))
    monkeypatch.undo()
    assert run(process, 1) == {"text": "done"}


def test_a_process_ends_with_what_needs_it() -> None:
    process = TemplateProcess("a")
    assert process.render("{}") == {"text": "a"}
    assert len(renderers(os.getpid())) == 1
    del process
    gc.collect()
    assert not renderers(os.getpid())


def test_a_template_that_takes_too_long_to_compile_does_so_for_each() -> None:
    process = TemplateProcess("{{ 9 ** 99999999 }}")
    process.start()
    for _ in range(2):
        assert "longer than" in process.render("{}")["error"]

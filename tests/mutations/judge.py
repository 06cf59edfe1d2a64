"""Load mutated bundles, each in a process of its own, and tell how that ended."""

import os
import random
import select
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutations.mutate import Mutation, bring, mutate
from sedac_runtime import SedacError, SedacModel

PROMPT = [5, 9, 2, 7, 5, 9, 2, 7]
NEW_TOKENS = 6
SECONDS = 10.0
# for what was late: a machine under load starves processes that are well
MORE_SECONDS = 60.0


@dataclass(frozen=True)
class Verdict:
    """How mutation `number` ended: "refused", "right", or what must not be: "wrong", "crash",
    "hang" and "traceback". "forged" is other tokens where the digests vouch for them."""

    number: int
    outcome: str
    mutation: Mutation
    message: str

    @property
    def is_bad(self) -> bool:
        """Whether it must not be."""
        return self.outcome not in ("refused", "right", "forged")


def expected(bundle: Path) -> str:
    """What the whole bundle gives."""
    outcome, message = _in_a_child(bundle)
    assert outcome == "ran", message
    return message


def judge(bundle: Path, count: int, seed: int) -> Iterator[Verdict]:
    """Verdicts on `count` mutations of `bundle`, drawn by `seed`."""
    right = expected(bundle)
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        with tempfile.TemporaryDirectory(dir=bundle.parent) as scratch:
            outside = Path(scratch) / "outside"
            outside.mkdir()
            (outside / "secret").write_text("secret")
            copy = Path(scratch) / "bundle"
            bring(bundle, copy)
            mutation = mutate(copy, outside, draw)
            outcome, message = _in_a_child(copy)
            if outcome == "hang":
                outcome, message = _in_a_child(copy, MORE_SECONDS)
        yield Verdict(number, _verdict(outcome, message == right, mutation), mutation, message)


def counts(verdicts: list[Verdict]) -> Counter[str]:
    """How many ended in which way."""
    return Counter(verdict.outcome for verdict in verdicts)


def _verdict(outcome: str, right: bool, mutation: Mutation) -> str:
    if outcome != "ran":
        return outcome
    if right:
        return "right"
    return "forged" if mutation.forged else "wrong"


def _in_a_child(bundle: Path, seconds: float = SECONDS) -> tuple[str, str]:
    """Run the bundle in a child: "ran" and its tokens, or how it ended and why."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, _run(bundle).encode("utf-8", "replace")[:60000])
        os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], seconds)
        if not ready:
            os.kill(child, signal.SIGKILL)
        said = os.read(reading, 65536).decode("utf-8", "replace") if ready else ""
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if not ready:
        return "hang", ""
    if not os.WIFEXITED(status) or os.WEXITSTATUS(status) or not said:
        return "crash", f"status {status}"
    outcome, _, message = said.partition("\n")
    return outcome, message


def _run(bundle: Path) -> str:
    """Generate in each mode, read a chat and the text."""
    try:
        model = SedacModel.from_pretrained(bundle, threads=1)
        tokens = [
            model.generate(PROMPT, max_new_tokens=NEW_TOKENS, mode=mode, stop_tokens=[]).tokens
            for mode in ("full", "lossless")
        ]
        exits = model.generate(
            PROMPT, max_new_tokens=NEW_TOKENS, forced_exit=[1], stop_tokens=[]
        ).tokens
        text = model.decode(tokens[0])
        chat = model.encode_chat([{"role": "user", "content": "hello"}])
    except (SedacError, OSError) as error:
        lines = str(error).splitlines()
        return f"refused\n{error}" if len(lines) == 1 else f"traceback\n{error!r}"
    except BaseException as error:
        return f"traceback\n{error!r}"
    return f"ran\n{tokens} {exits} {text!r} {chat}"

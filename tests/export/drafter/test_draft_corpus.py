"""The corpus that a drafter is trained on: what is held out, and when writing ends."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from sedac_export.drafter import draft_corpus
from sedac_export.drafter.draft_corpus import HELD_OUT, OwnText, SelfDistillation, write_corpus
from sedac_export.errors import SedacError


@dataclass
class FakeDistillation:
    """Writes one token after each prompt, and messages that come to an end or do not."""

    messages_end: bool
    batch: int = 32
    tokenizer: Any = None
    asked: list[int] = field(default_factory=list)

    def messages(self, count: int, beginning: str) -> list[str]:
        self.asked.append(count)
        return ["Hello"] * count if self.messages_end else []

    def answers(self, prompts: list[list[int]], temperature: float) -> list[OwnText]:
        return [OwnText([*prompt, 7], len(prompt)) for prompt in prompts]


def _distillation(messages_end: bool) -> tuple[FakeDistillation, SelfDistillation]:
    fake = FakeDistillation(messages_end)
    typed: Any = fake
    return fake, typed


def test_one_in_a_hundred_greedy_texts_is_held_out_whatever_the_batch() -> None:
    _, distillation = _distillation(messages_end=True)
    texts = [[number] for number in range(1280)]
    seen: list[tuple[int, int]] = []
    corpus = write_corpus(
        distillation, 0, texts, lambda: False, lambda done, of: seen.append((done, of))
    )
    assert len(corpus.held_out) == -(-640 // HELD_OUT)
    assert len(corpus.training) + len(corpus.held_out) == 1280
    assert seen[-1] == (1280, 1280)


def test_messages_without_an_end_do_not_outlast_the_deadline() -> None:
    fake, distillation = _distillation(messages_end=False)
    seen: list[tuple[int, int]] = []
    with pytest.raises(SedacError, match="no messages that end"):
        write_corpus(distillation, 1000, [], lambda: True, lambda done, of: seen.append((done, of)))
    assert (fake.asked, seen) == ([32], [(32, 1000)])


def test_a_request_shows_whole_characters_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def decode(self, tokens: list[int], **_: bool) -> str:
            return "\ufffdabc\ufffd"

    shown: list[str] = []
    monkeypatch.setattr(draft_corpus, "answer_start", lambda _, text: shown.append(text) or [1])
    tokenizer: Any = Tokenizer()
    assert draft_corpus.request_about(tokenizer, "Explain:", [1, 2]) == [1]
    assert shown == ["Explain:\n\nabc"]


def test_progress_counts_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_corpus, "answer_start", lambda _, message: [1, 2])
    _, distillation = _distillation(messages_end=True)
    seen: list[tuple[int, int]] = []
    corpus = write_corpus(
        distillation, 40, [[3]], lambda: False, lambda done, of: seen.append((done, of))
    )
    assert seen[-1] == (41, 41)
    assert len(corpus.training) + len(corpus.held_out) == 41

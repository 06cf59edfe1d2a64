"""Texts that a model wrote itself: what its drafter drafts is the model's own text."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sedac_export.drafter.batch_decoding import write_texts
from sedac_export.errors import SedacError

# one in so many texts that are written greedily is held out
HELD_OUT = 100
# batches are answered greedily and sampled in turn
TEMPERATURE = 0.7
# of the messages: small models write few that make sense at 1, and few different ones at 0.5
MESSAGE_TEMPERATURE = 0.8
TEXT_SHARE = 0.25
MAX_PROMPT_TOKENS = 160
# how messages begin, in turn: left to the model two times of three, else a request for code, which
# models seldom make on their own and are often asked for
MESSAGE_STARTS = ("", "Write a Python function", "")
# what is asked about texts, in turn: models that write messages seldom give a text in them
TEXT_REQUESTS = (
    "Summarize the following:",
    "Explain the following in simple words:",
    "Rewrite the following more clearly:",
    "Find and correct the mistakes in the following:",
)

CountProgress = Callable[[int, int], None]


@dataclass
class OwnText:
    """A text's tokens. generated: where what the model wrote starts."""

    tokens: list[int]
    generated: int


@dataclass
class DraftCorpus:
    """The texts to train on, and those held out."""

    training: list[OwnText] = field(default_factory=list)
    held_out: list[OwnText] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the corpus, one text a line."""
        with path.open("w") as file:
            for held_out, texts in ((False, self.training), (True, self.held_out)):
                for text in texts:
                    file.write(json.dumps([held_out, text.generated, text.tokens]) + "\n")

    @classmethod
    def load(cls, path: Path) -> "DraftCorpus":
        """The corpus that `save` wrote. Raises SedacError when it is damaged."""
        corpus = cls()
        try:
            with path.open() as file:
                for line in file:
                    held_out, generated, tokens = json.loads(line)
                    texts = corpus.held_out if held_out else corpus.training
                    texts.append(OwnText(tokens, generated))
        except ValueError as error:
            raise SedacError(f"{path} is damaged ({error}); delete it") from error
        return corpus

    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(text.tokens) for text in (*self.training, *self.held_out))

    def frequent_tokens(self, vocab_size: int, count: int) -> npt.NDArray[np.int64]:
        """The `count` most frequent tokens of what the model wrote, ascending; int64."""
        written = [np.asarray(text.tokens[text.generated :]) for text in self.training]
        counts = np.bincount(np.concatenate(written), minlength=vocab_size)
        return np.sort(np.argsort(-counts, kind="stable")[:count]).astype(np.int64)


def request_about(tokenizer: PreTrainedTokenizerBase, request: str, text: list[int]) -> list[int]:
    """The start of the answer to `request` about the text of the tokens `text`."""
    # it may begin or end inside of a character
    shown = str(tokenizer.decode(text, skip_special_tokens=True)).strip("\ufffd")
    return answer_start(tokenizer, f"{request}\n\n{shown}")


def user_turn_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The chat template up to where a user's message begins.

    Raises SedacError for a tokenizer without chat template.
    """
    marker = "\u2603"
    text = _in_template(tokenizer, marker)
    start: list[int] = tokenizer(text[: text.index(marker)], add_special_tokens=False).input_ids
    return start


def answer_start(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """The chat template with a user's `message`, up to where the answer begins."""
    tokens: list[int] = tokenizer(
        _in_template(tokenizer, message), add_special_tokens=False
    ).input_ids
    return tokens


def _in_template(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    if not tokenizer.chat_template:
        raise SedacError(
            "the model has no chat template, so it cannot write prompts; give texts with --data"
        )
    messages = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text)


@dataclass
class SelfDistillation:
    """Has `model` write texts, `batch` at a time, each of at most `max_tokens` new tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch: int
    max_tokens: int
    generator_seed: int = 0

    def messages(self, count: int, beginning: str) -> list[str]:
        """User messages from `beginning` on, sampled after the template's beginning of a turn.

        Fewer than `count`: those that do not come to an end are left out. Magpie, Xu et al. 2024,
        https://arxiv.org/abs/2406.08464
        """
        start = user_turn_start(self.tokenizer)
        start += self.tokenizer(beginning, add_special_tokens=False).input_ids
        written = self._write([start] * count, MESSAGE_TEMPERATURE, MAX_PROMPT_TOKENS)
        ended = (tokens for tokens in written if tokens[-1] in self._ends())
        rests = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in ended)
        texts = (f"{beginning}{rest}".strip() for rest in rests)
        return [text for text in texts if text]

    def answers(self, prompts: Sequence[list[int]], temperature: float) -> list[OwnText]:
        """Each of `prompts` with what the model writes after it; 0 is greedy."""
        # passes end with their longest text, and prompts are padded to the longest
        ordered = sorted(prompts, key=len)
        answers = self._write(ordered, temperature, self.max_tokens)
        pairs = zip(ordered, answers, strict=True)
        return [OwnText([*prompt, *answer], len(prompt)) for prompt, answer in pairs if answer]

    def _write(
        self, prompts: Sequence[list[int]], temperature: float, most: int
    ) -> list[list[int]]:
        """What follows each of `prompts`, the token that ends it included."""
        texts = []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            texts += write_texts(self.model, part, most, temperature, self._ends())
        return texts

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [0] if ends is None else ends if isinstance(ends, list) else [ends]


def write_corpus(
    distillation: SelfDistillation,
    messages: int,
    texts: Sequence[list[int]],
    deadline: Callable[[], bool],
    progress: CountProgress,
) -> DraftCorpus:
    """A corpus of `messages` messages that the model writes and answers, and of the starts `texts`.

    Ends early once `deadline` says so, with what there is.

    Raises SedacError when nothing was written, or none of the messages came to an end.
    """
    corpus = DraftCorpus()
    total = messages + len(texts)
    done = greedy_texts = 0
    for turn, (asked, part) in enumerate(_starts(distillation, messages, texts)):
        greedy = turn % 2 == 0
        for text in distillation.answers(part, 0.0 if greedy else TEMPERATURE):
            held_out = greedy and greedy_texts % HELD_OUT == 0
            (corpus.held_out if held_out else corpus.training).append(text)
            greedy_texts += greedy
        done += asked
        progress(done, total)
        if deadline():
            break
    if not corpus.training or not corpus.held_out:
        raise SedacError(
            "the model wrote no messages that end, and no texts; give more --data, or a larger"
            " --self-distill"
        )
    return corpus


def _starts(
    distillation: SelfDistillation, messages: int, texts: Sequence[list[int]]
) -> Iterator[tuple[int, list[list[int]]]]:
    """What the model goes on from, a batch at a time: messages of its own and starts of `texts`.

    As long as there are both, TEXT_SHARE of a batch are of `texts`. Beside each batch, how many
    were asked for: messages without an end are not among them.
    """
    waiting = list(texts)
    beginnings = itertools.cycle(MESSAGE_STARTS)
    while messages > 0 or waiting:
        share = TEXT_SHARE if messages > 0 else 1.0
        batch = waiting[: max(1, round(share * distillation.batch))]
        waiting = waiting[len(batch) :]
        count = min(distillation.batch - len(batch), messages)
        messages -= count
        asked = len(batch) + count
        if count > 0:
            written = distillation.messages(count, next(beginnings))
            batch += [answer_start(distillation.tokenizer, message) for message in written]
        yield asked, batch

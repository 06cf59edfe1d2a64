"""A model for lm-evaluation-harness (the package lm-eval), under the name "sedac".

python -m sedac_runtime.lm_eval run --model sedac --model_args bundle=engines/demo,mode=exit ...

takes the arguments of the command lm_eval.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

from lm_eval import __main__ as lm_eval_command
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sedac_runtime import _core
from sedac_runtime._core import InputError, SedacError, TextStream
from sedac_runtime.choices import Drafter, Mode, PolicyName
from sedac_runtime.model import SedacModel
from sedac_runtime.ranges import check_count
from sedac_runtime.serve.token_text import StopFilter

_GENERATED = 256  # tokens, where a task does not say
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_TAKEN = {*_SAMPLING, "until", "max_gen_toks", "do_sample"}
# what lm_eval adds to the model's arguments, batch_size aside
_HARNESS = {"device", "max_batch_size", "trust_remote_code"}


@dataclass
class _Scored:
    """A continuation that is forced token by token, and what the model thought of it."""

    context: list[int]
    continuation: list[int]
    logprobs: list[float] = field(default_factory=list)
    is_greedy: bool = True


@dataclass
class _Written:
    """A text that is generated up to a stop string."""

    stream: TextStream
    stops: StopFilter
    text: str = ""


@register_model("sedac")
class SedacLM(TemplateLM):  # type: ignore[misc]
    """A bundle. In mode "exit" every token is scored, or generated, at the layer where it exits.

    batch_size: sequences that run together. The other settings are those of `SedacModel.stream`.
    """

    def __init__(
        self,
        bundle: str | None = None,
        batch_size: int | str = 1,
        mode: Mode = "full",
        policy: PolicyName | None = None,
        threshold: float | None = None,
        tau: float | None = None,
        consecutive_k: int | None = None,
        drafter: Drafter | None = None,
        threads: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _refuse_unknown(others)
        sequences = _sequences(batch_size)
        if bundle is None:
            raise InputError("model argument bundle is missing; give the directory of a bundle")
        model = SedacModel.from_pretrained(bundle, threads=threads)
        self._core = model.core
        self._bos_token = model.chat_templates.special_tokens().get("bos_token")
        try:
            self._decoding = self._core.decoding(
                mode,
                policy=policy,
                threshold=threshold,
                tau=tau,
                consecutive_k=consecutive_k,
                drafter=drafter,
            )
        except TypeError as error:  # lm_eval gives each argument the type that it looks like
            reason = " ".join([str(error), *getattr(error, "__notes__", [])])
            raise InputError(f"a model argument is of another type: {reason}") from error
        self._scheduler = _core.Scheduler(self._core, max_sequences=sequences)
        self._seed = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        tokens = self._core.eos_token_ids
        if not tokens:
            raise InputError("the bundle has no end-of-text token, which texts are scored after")
        return tokens[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text: the tokenizer's bos_token, else what ends one."""
        tokens = self.tok_encode(self._bos_token or "", add_special_tokens=False)
        return tokens[0] if len(tokens) == 1 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval asks for before it applies a chat template."""
        raise InputError("chat templates are not applied; leave out --apply_chat_template")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with the special tokens that the model expects unless told otherwise."""
        return self._core.encode(string, add_special_tokens is not False)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """The log-likelihood of each whole text, in windows as long as the cache."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._core.max_cache_length - 1,
                context_len=1,
            )
            scored = self._score(map(make_disjoint_window, windows))
            totals.append(sum(sum(window.logprobs) for window in scored))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its stop strings.

        Sampled ones take the seeds 0, 1 and so on. Raises InputError for settings of a task that
        would change its texts and are not supported.
        """
        running: dict[int, _Written] = {}
        order = []
        for request in requests:
            context = request.args[0]
            settings = normalize_gen_kwargs(request.args[1], _GENERATED)
            written = _Written(self._core.text_stream(), StopFilter(settings["until"]))
            running[self._add_context(context, settings)] = written
            order.append(written)
        for progress in self._progress(running):
            written = running[progress.sequence]
            for token in progress.tokens:
                written.text += written.stops.push(written.stream.push(token.id))
            if written.stops.stopped:
                self._scheduler.cancel(progress.sequence)
                del running[progress.sequence]
            elif progress.finish_reason is not None:
                written.text += written.stops.push(written.stream.finish())
                written.text += written.stops.finish()
                del running[progress.sequence]
        return [written.text for written in order]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        scored = self._score((context, continuation) for _, context, continuation in requests)
        return [(sum(text.logprobs), text.is_greedy) for text in scored]

    def _score(self, texts: Iterable[tuple[list[int], list[int]]]) -> list[_Scored]:
        """Force every continuation, as a sequence of which one token is allowed at a time."""
        scored = [_Scored(list(context), list(after)) for context, after in texts]
        running = {self._add_scored(text): text for text in scored if text.continuation}
        for progress in self._progress(running):
            text = running[progress.sequence]
            for token in progress.tokens:
                assert token.logprob is not None
                text.logprobs.append(token.logprob)
                text.is_greedy &= token.top_logprobs[0][0] == token.id
            if progress.finish_reason is not None:
                del running[progress.sequence]
            elif progress.tokens:
                self._allow(progress.sequence, text.continuation[len(text.logprobs)])
        return scored

    def _add_scored(self, text: _Scored) -> int:
        room = self._core.max_cache_length - len(text.continuation)
        if room < 1:
            raise InputError(
                f"a continuation of {len(text.continuation)} tokens does not fit into the cache of"
                f" {self._core.max_cache_length}; build the bundle with a longer one"
            )
        sequence = self._scheduler.add(
            text.context[-room:],
            self._decoding,
            _core.Sampling(),
            max_new_tokens=len(text.continuation),
            stop_tokens=[],
            top_logprobs=1,
            constrained=True,
        )
        self._allow(sequence, text.continuation[0])
        return sequence

    def _allow(self, sequence: int, token: int) -> None:
        mask = bytearray(4 * (token // 32 + 1))
        mask[token // 8] = 1 << token % 8
        self._scheduler.allow({sequence: mask})

    def _add_context(self, context: str, settings: dict[str, Any]) -> int:
        tokens = settings["max_gen_toks"]
        cache = self._core.max_cache_length
        room = cache - tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks {tokens} leaves no room for a prompt in the cache of {cache}"
                " positions; set a smaller max_gen_toks or build the bundle with a longer"
                " --max-cache-length"
            )
        return self._scheduler.add(
            self.tok_encode(context)[-room:] or [self.prefix_token_id],
            self._decoding,
            self._sampling(settings),
            max_new_tokens=tokens,
            stop_tokens=self._core.eos_token_ids,
        )

    def _sampling(self, settings: dict[str, Any]) -> _core.Sampling:
        others = settings.keys() - _TAKEN
        if settings.get("num_beams") == 1:  # as here
            others.discard("num_beams")
        if others:
            raise InputError(
                f"generation setting {min(others)} is not supported; leave it out of the task's"
                " generation_kwargs"
            )
        taken = {name: settings[name] for name in _SAMPLING if name in settings}
        if settings["do_sample"]:
            taken["seed"] = self._seed
            self._seed += 1
        return _core.Sampling(**taken)

    def _progress(self, running: dict[int, Any]) -> Iterator[_core.Progress]:
        """What steps do, until nothing is left in `running`."""
        while running:
            for progress in self._scheduler.step():
                if progress.error is not None:
                    raise _core.EngineError(progress.error)
                yield progress


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    unknown = arguments.keys() - _HARNESS
    if unknown:
        taken = signature(SedacLM).parameters.values()
        known = ", ".join(each.name for each in taken if each.kind is not Parameter.VAR_KEYWORD)
        raise InputError(f"model argument {min(unknown)} is not known; known are {known}")


def _sequences(batch_size: int | str) -> int:
    try:
        sequences = int(batch_size)
    except ValueError as error:
        raise InputError(
            f"batch_size {batch_size} is not a number; give how many sequences run together"
        ) from error
    check_count("batch_size", sequences, 1)
    return sequences


def main() -> None:
    """Run the command lm_eval, which knows this model; what the model refuses is one line."""
    try:
        lm_eval_command.cli_evaluate()
    except SedacError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

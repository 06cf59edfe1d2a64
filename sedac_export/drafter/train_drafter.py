"""Train a drafter for a model: what `sedac-export train-drafter` does before it edits a bundle."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sedac_export.drafter.draft_corpus import (
    TEXT_REQUESTS,
    DraftCorpus,
    OwnText,
    SelfDistillation,
    request_about,
    write_corpus,
)
from sedac_export.drafter.draft_model import DrafterShape, DraftModel
from sedac_export.drafter.drafter_file import DRAFTER, SAMPLED_ROWS, DrafterFile
from sedac_export.drafter.fit_drafter import (
    CHECKPOINT,
    ROLLOUT_STEPS,
    Fit,
    FitSettings,
    FrozenModel,
    start_from_last_layer,
)
from sedac_export.drafter.training_folder import digest_of, fingerprint, open_folder
from sedac_export.errors import SedacError
from sedac_export.model.reference import load_original
from sedac_export.model.skeleton import Skeleton

DRAFT_VOCABULARY = 16384
# of the given minutes, what writing the corpus may take
CORPUS_SHARE = 0.35
# texts from --data are cut into pieces of PIECE tokens, of whose beginning the model goes on
PIECE = 384
SHORTEST_START, LONGEST_START = 16, 160
# a start, or a message of the model's own, in a chat template and with what is asked about it
LONGEST_PROMPT = 2 * LONGEST_START
# of a GPU's free memory, what the texts that are written at once may take
MEMORY_SHARE = 0.4
CORPUS, REPORT = "corpus.jsonl", "drafter-report.json"
# a step of the rollout needs tokens to be compared with
_SHORTEST = ROLLOUT_STEPS + 2

# called with the stage's name, steps done and steps in total
StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DrafterRequest:
    """What to train, and for how long.

    model: its name, for the drafter's file. messages: those that the model writes and answers
    itself. texts: documents whose beginnings it continues, and with `messages` also answers
    requests about. minutes: for everything, None as long as it takes. folder: where all of it
    goes; what an earlier run left there is gone on from.
    """

    folder: Path
    model: str
    messages: int = 0
    texts: tuple[str, ...] = ()
    minutes: float | None = None
    device: str = "cpu"
    seed: int = 0
    steps: int | None = None
    max_tokens: int = 256


@dataclass(frozen=True)
class _Scale:
    """Sizes that suit a device. most_texts: that are written at once."""

    most_texts: int
    batch_tokens: int
    steps: int

    @classmethod
    def of(cls, device: str) -> "_Scale":
        return cls(4096, 16384, 6000) if device == "cuda" else cls(32, 2048, 2000)


def load_model(directory: Path, device: str) -> PreTrainedModel:
    """The model in `directory`, in bf16 on a GPU.

    Raises SedacError where there is no GPU, and for a model that cannot be exported, or that a
    drafter cannot have the shape of.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SedacError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    Skeleton.load(directory)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = load_original(directory, dtype=dtype)
    _check_shape(model, directory)
    moved: PreTrainedModel = model.to(device)
    return moved


def _check_shape(model: PreTrainedModel, directory: Path) -> None:
    try:
        hidden = DrafterShape.of(model).hidden_size
    except Exception as error:  # of configurations whose layers differ, in ways of their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SedacError(
            f"{directory} has no one shape of a layer ({reason}), which a drafter would have; draft"
            " by prompt lookup or early exit"
        ) from error
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.shape[1] != hidden:
        raise SedacError(
            f"{directory} has embeddings of {embeddings.weight.shape[1]} numbers and layers of"
            f" {hidden}, which a drafter joins; draft by prompt lookup or early exit"
        )


def train_drafter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: DrafterRequest,
    progress: StageProgress,
) -> dict[str, Any]:
    """Write a corpus, fit a drafter, and leave it in the folder; its report.

    Raises SedacError when there is too little to train on, and where the folder is of another
    request.
    """
    started = time.monotonic()
    torch.manual_seed(request.seed)
    wanted = {
        "model": fingerprint(model),
        "texts": digest_of(request.texts),
        "messages": request.messages,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
    }
    open_folder(request.folder, wanted, (CORPUS, CHECKPOINT, DRAFTER))
    scale = _Scale.of(request.device)
    budget = None if request.minutes is None else 60 * request.minutes
    corpus = prepare_corpus(model, tokenizer, request, progress)
    training, held_out = _usable(corpus.training), _usable(corpus.held_out)
    written = time.monotonic() - started
    fit, tokens = _fit(model, corpus, request, scale)
    steps = request.steps or scale.steps
    resumed = _resume(fit, request, steps)
    if not resumed and budget is not None and request.steps is None:
        seconds = fit.seconds_per_step(training)
        # evaluations take a part of the time
        left = budget - (time.monotonic() - started)
        steps = max(20, int(0.9 * left / seconds))
        fit.settings = _settings(request, scale, steps)
    fit.run(
        training,
        held_out,
        lambda done, of: progress("train", done, of),
        lambda: budget is not None and time.monotonic() - started > budget,
    )
    sample = fit.frozen.head[:SAMPLED_ROWS]
    DrafterFile(fit.drafter, tokens, sample, {"model": request.model}).save(
        request.folder / DRAFTER
    )
    report = _report(fit, corpus, written, time.monotonic() - started)
    (request.folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def prepare_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: DrafterRequest,
    progress: StageProgress,
) -> DraftCorpus:
    """The folder's corpus, written now if there is none."""
    started = time.monotonic()
    path = request.folder / CORPUS
    if path.exists():
        return DraftCorpus.load(path)
    batch = min(_Scale.of(request.device).most_texts, _texts_that_fit(model, request.max_tokens))
    distillation = SelfDistillation(model, tokenizer, batch, request.max_tokens)
    starts = list(_starts(tokenizer, request))
    limit = None if request.minutes is None else 60 * request.minutes * CORPUS_SHARE
    corpus = write_corpus(
        distillation,
        request.messages,
        starts,
        lambda: limit is not None and time.monotonic() - started > limit,
        lambda done, of: progress("write", done, of),
    )
    for texts in (corpus.training, corpus.held_out):
        _usable(texts)  # or nothing is kept of it
    new = path.with_suffix(".new")
    corpus.save(new)
    new.replace(path)
    return corpus


def _texts_that_fit(model: PreTrainedModel, max_tokens: int) -> int:
    """How many texts of `max_tokens` after a prompt fit in a GPU's free memory, at least 1."""
    if model.device.type != "cuda":
        return sys.maxsize
    shape, layers = DrafterShape.of(model), model.config.get_text_config().num_hidden_layers
    keys_and_values = 2 * layers * shape.key_value_heads * shape.head_size * model.dtype.itemsize
    # sampling holds a few copies of the logits in fp32
    text = (max_tokens + LONGEST_PROMPT) * keys_and_values + 20 * shape.vocab_size
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, int(MEMORY_SHARE * free / text))


def _starts(tokenizer: PreTrainedTokenizerBase, request: DrafterRequest) -> Iterator[list[int]]:
    """Beginnings of pieces of the texts, of various lengths, in random order.

    Where the model also answers messages, every second one is part of a message that asks about it.
    """
    generator = torch.Generator().manual_seed(request.seed)
    pieces = []
    for text in request.texts:
        tokens: list[int] = tokenizer(text).input_ids
        pieces += [tokens[start : start + PIECE] for start in range(0, len(tokens), PIECE)]
    order = torch.randperm(len(pieces), generator=generator).tolist()
    long_enough = (pieces[index] for index in order if len(pieces[index]) >= SHORTEST_START)
    requests = itertools.cycle(TEXT_REQUESTS)
    for turn, piece in enumerate(long_enough):
        length = int(torch.randint(SHORTEST_START, LONGEST_START, (1,), generator=generator))
        if request.messages > 0 and turn % 2:
            yield request_about(tokenizer, next(requests), piece[:length])
        else:
            yield piece[:length]


def _usable(texts: Sequence[OwnText]) -> list[OwnText]:
    usable = [text for text in texts if len(text.tokens) - text.generated >= _SHORTEST]
    if not usable:
        raise SedacError(
            "the model wrote no text long enough to train on; give more --data, or a larger"
            " --self-distill"
        )
    return usable


def _settings(request: DrafterRequest, scale: _Scale, steps: int) -> FitSettings:
    length = LONGEST_PROMPT + request.max_tokens
    return FitSettings(steps, scale.batch_tokens, length, seed=request.seed)


def _fit(
    model: PreTrainedModel, corpus: DraftCorpus, request: DrafterRequest, scale: _Scale
) -> tuple[Fit, torch.Tensor]:
    shape = DrafterShape.of(model)
    frequent = corpus.frequent_tokens(shape.vocab_size, min(shape.vocab_size, DRAFT_VOCABULARY))
    tokens = torch.from_numpy(frequent)
    drafter = DraftModel(shape)
    start_from_last_layer(drafter, model)
    frozen = FrozenModel(model, shape.feature_layers, tokens)
    drafter.to(model.device)
    settings = _settings(request, scale, request.steps or scale.steps)
    return Fit(drafter, frozen, settings, request.folder), tokens


def _resume(fit: Fit, request: DrafterRequest, steps: int) -> bool:
    return fit.resume(None if request.minutes and not request.steps else steps)


def _report(fit: Fit, corpus: DraftCorpus, written: float, seconds: float) -> dict[str, Any]:
    best = fit.state.best()
    return {
        "device": _device_name(fit.device),
        "training_texts": len(corpus.training),
        "held_out_texts": len(corpus.held_out),
        "tokens": corpus.tokens(),
        "draft_vocabulary": len(fit.frozen.tokens),
        "parameters": sum(p.numel() for p in fit.drafter.parameters()),
        "settings": asdict(fit.settings),
        "steps": fit.state.step,
        "best": asdict(best),
        "evaluations": [asdict(evaluation) for evaluation in fit.state.evaluations],
        "losses": fit.state.losses,
        "corpus_seconds": round(written, 1),
        "seconds": round(seconds, 1),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

"""Fit a drafter to a frozen model, on its own rollout."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sedac_export.drafter.draft_corpus import OwnText
from sedac_export.drafter.draft_model import DraftModel, rollout_mask
from sedac_export.errors import SedacError
from sedac_export.model.decoder import find_layers

ROLLOUT_STEPS = 4
# what a later step of the rollout weighs relative to the one before: it is drafted less often
STEP_WEIGHT = 0.8
EVALUATIONS = 20
# evaluations without a better one, after which training ends
PATIENCE = 6
WARM_UP = 0.04
CHECKPOINT = "checkpoint.pt"
# steps whose losses a GPU's host reads at once: each reading waits until it has nothing to do
STEPS_AT_ONCE = 16
_ALIGNMENT = 8

# called with steps done and steps in total
FitProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class FitSettings:
    """How to train. batch_tokens: tokens of a step, padding included. length: longest text."""

    steps: int
    batch_tokens: int
    length: int
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass
class Evaluation:
    """What a drafter reaches on held-out texts that the model wrote greedily.

    accuracy: of each step of the rollout, where the steps before it were right. tokens_per_round:
    the mean of accepted tokens and one.
    """

    step: int
    loss: float
    tokens_per_round: float
    accuracy: list[float]


@dataclass
class FitState:
    """Where training stands, all that a checkpoint holds beside tensors."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    def best(self) -> Evaluation:
        """The evaluation with the most tokens a round."""
        return max(self.evaluations, key=lambda found: (found.tokens_per_round, -found.loss))

    def is_stuck(self) -> bool:
        """Whether the last evaluations were all worse than one before them."""
        best = self.evaluations.index(self.best()) if self.evaluations else 0
        return len(self.evaluations) - 1 - best >= PATIENCE


class FrozenModel:
    """The model's residual streams, logits and embeddings.

    While it runs, its head has the rows of the draft vocabulary only.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], tokens: Tensor) -> None:
        frozen: Any = model
        self.model: PreTrainedModel = frozen.eval().requires_grad_(False)
        self.tokens = tokens.to(model.device)
        self.embed: nn.Module = model.get_input_embeddings()
        self._whole: nn.Module = frozen.get_output_embeddings()
        self._pruned = _pruned(frozen.get_output_embeddings(), self.tokens)
        self.head = self._pruned.weight.detach().float()
        self._features: dict[int, Tensor] = {}
        modules = find_layers(model)
        for depth in layers:
            modules[depth - 1].register_forward_hook(self._keep(depth))
        self.layers = tuple(layers)

    def _keep(self, depth: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._features[depth] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def run(self, tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Residual streams, logits of the draft vocabulary, and embeddings of `tokens` [b, n]."""
        frozen: Any = self.model
        frozen.set_output_embeddings(self._pruned)
        try:
            logits = frozen(input_ids=tokens, use_cache=False).logits
        finally:
            frozen.set_output_embeddings(self._whole)
        features = [self._features[depth] for depth in self.layers]
        return features, logits, self.embed(tokens)


class _Batch:
    """Texts on the device, and where the steps of a rollout look."""

    def __init__(self, texts: Sequence[OwnText], length: int, device: torch.device) -> None:
        tokens, counted = _padded(texts, length)
        before_counted = _shifted(counted, 1)
        row_of = before_counted.flatten().cumsum(0) - 1

        def sent(indices: Tensor) -> Tensor:
            # the host goes on, and the device's queue never has to run empty
            pinned = indices.pin_memory() if device.type == "cuda" else indices
            return pinned.to(device, non_blocking=True)

        self.tokens = sent(tokens)
        # [rows], positions in all texts whose next token counts
        self.wanted = sent(_places(before_counted))
        places = [_places(_shifted(counted, 2 + step)) for step in range(ROLLOUT_STEPS)]
        # by step: the positions that draft a token that counts, and the row of the wanted one
        self.places = [sent(at) for at in places]
        self.rows = [sent(row_of[at + 1 + step]) for step, at in enumerate(places)]


@dataclass
class Fit:
    """A drafter in training. folder: where checkpoints go, None for none."""

    drafter: DraftModel
    frozen: FrozenModel
    settings: FitSettings
    folder: Path | None = None
    state: FitState = field(default_factory=FitState)

    def __post_init__(self) -> None:
        parameters = list(self.drafter.parameters())
        self.device = self.frozen.model.device
        self.optimizer = torch.optim.AdamW(
            parameters,
            self.settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            fused=self.device.type == "cuda",
        )
        self.kept = _copied(self.drafter)

    def run(
        self,
        training: Sequence[OwnText],
        held_out: Sequence[OwnText],
        progress: FitProgress,
        deadline: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train to the end, and leave the drafter as it was best on `held_out`."""
        interval = max(1, self.settings.steps // EVALUATIONS)
        batches = _batches(training, self.settings)
        unread: list[Tensor] = []
        steps_at_once = STEPS_AT_ONCE if self.device.type == "cuda" else 1
        while self.state.step < self.settings.steps and not self.state.is_stuck():
            unread.append(self._step(self._batch(batches, training)))
            self.state.step += 1
            is_last = self.state.step == self.settings.steps
            evaluates = is_last or self.state.step % interval == 0
            if not evaluates and len(unread) < steps_at_once:
                continue
            self.state.losses += torch.stack(unread).tolist()
            unread.clear()
            progress(self.state.step, self.settings.steps)
            late = deadline()
            if evaluates or late:
                self._evaluate(held_out)
                self._save()
            if late:
                break
        if not self.state.evaluations:
            self._evaluate(held_out)
        self.drafter.load_state_dict(self.kept)

    def _batch(self, batches: list[list[int]], texts: Sequence[OwnText]) -> list[OwnText]:
        epoch, index = divmod(self.state.step, len(batches))
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        order = torch.randperm(len(batches), generator=generator)
        return [texts[i] for i in batches[int(order[index])]]

    def _step(self, texts: Sequence[OwnText]) -> Tensor:
        """Take a step on `texts`, and its loss, a scalar that the device may not have yet."""
        self.drafter.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self._schedule()
        self.optimizer.zero_grad(set_to_none=True)
        total: Any = torch.zeros((), device=self.device)
        batch = _Batch(texts, self.settings.length, self.device)
        for step, (loss, _) in enumerate(self._rollout(batch)):
            total = total + STEP_WEIGHT**step * loss
        total.backward()
        nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        self.optimizer.step()
        result: Tensor = total.detach()
        return result

    def _schedule(self) -> float:
        """The learning rate's share: a warm-up, then half a cosine down to a twentieth."""
        done = self.state.step / self.settings.steps
        if done < WARM_UP:
            return (self.state.step + 1) / (WARM_UP * self.settings.steps + 1)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

    def _rollout(self, batch: _Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step: its loss, and the logits [places, draft vocabulary] at its places.

        Step j at position t knows the text up to token t + 1 + j, drafted, and gives the next.
        """
        tokens = batch.tokens
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features, logits, embeddings = self.frozen.run(tokens)
            wanted = logits.flatten(0, 1)[batch.wanted].float().softmax(-1)
            state = self.drafter.state_of(features)
            positions = torch.arange(tokens.shape[1], device=self.device)[None]
            cache = DynamicCache()
            for step, (at, rows) in enumerate(zip(batch.places, batch.rows, strict=True)):
                mask = rollout_mask(tokens.shape[1], step, self.device)
                embedding = _shifted(embeddings, 1 + step)
                state = self.drafter(state, embedding, positions + step, mask, cache)
                own = self.drafter.logits(state.flatten(0, 1)[at], self.frozen.head)
                yield nn.functional.cross_entropy(own, wanted[rows]), own

    @torch.no_grad()
    def _evaluate(self, texts: Sequence[OwnText]) -> None:
        self.drafter.eval()
        right = torch.zeros(ROLLOUT_STEPS)
        reached = torch.zeros(ROLLOUT_STEPS)
        loss_sum, parts = 0.0, _batches(texts, self.settings)
        rounds = 0.0
        for part in parts:
            batch = _Batch([texts[i] for i in part], self.settings.length, self.device)
            tokens = batch.tokens.flatten()
            accepted = torch.ones(tokens.shape, dtype=torch.bool, device=self.device)
            rounds += len(batch.places[0])
            for step, (loss, own) in enumerate(self._rollout(batch)):
                loss_sum += float(loss) * STEP_WEIGHT**step / len(parts)
                at = batch.places[step]
                drafted = self.frozen.tokens[own.argmax(-1)]
                before = accepted[at]
                accepted = torch.zeros_like(accepted)
                accepted[at] = before & (drafted == tokens[at + 2 + step])
                reached[step] += float(before.sum())
                right[step] += float(accepted.sum())
        self.state.evaluations.append(
            Evaluation(
                self.state.step,
                loss_sum,
                1 + float(right.sum()) / max(1.0, rounds),
                (right / reached.clamp(min=1)).tolist(),
            )
        )
        if self.state.best() is self.state.evaluations[-1]:
            self.kept = _copied(self.drafter)

    def _save(self) -> None:
        if self.folder is None:
            return
        new = self.folder / f"{CHECKPOINT}.new"
        checkpoint = {
            "settings": asdict(self.settings),
            "state": asdict(self.state),
            "drafter": self.drafter.state_dict(),
            "kept": self.kept,
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            torch.save(checkpoint, new)
        except (OSError, RuntimeError) as error:
            new.unlink(missing_ok=True)
            reason = next(iter(str(error).splitlines()), "")
            raise SedacError(
                f"{self.folder / CHECKPOINT} cannot be written ({reason}); is the disk full?"
            ) from error
        new.replace(self.folder / CHECKPOINT)

    def resume(self, steps: int | None) -> bool:
        """Go on from the folder's checkpoint, if there is one of these settings.

        steps: None for as many as the checkpoint's, which were chosen by the time they take. Raises
        SedacError when the checkpoint is damaged.
        """
        path = None if self.folder is None else self.folder / CHECKPOINT
        if path is None or not path.exists():
            return False
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # of several libraries
            raise SedacError(f"{path} is damaged; delete it") from error
        settings = FitSettings(**saved["settings"])
        if settings != replace(self.settings, steps=settings.steps if steps is None else steps):
            return False
        self.settings = settings
        self.drafter.load_state_dict(saved["drafter"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.kept = saved["kept"]
        state = saved["state"]
        evaluations = [Evaluation(**evaluation) for evaluation in state["evaluations"]]
        self.state = FitState(state["step"], state["losses"], evaluations)
        return True

    def seconds_per_step(self, training: Sequence[OwnText], steps: int = 6) -> float:
        """What a step costs, measured without keeping what it did."""
        before, optimizer = _copied(self.drafter), self.optimizer.state_dict()
        batches = _batches(training, self.settings)

        def take(count: int) -> None:
            losses = [self._step(self._batch(batches, training)) for _ in range(count)]
            # the device has taken all of them when the host has their losses
            torch.stack(losses).tolist()

        take(2)
        started = time.monotonic()
        take(steps)
        elapsed = time.monotonic() - started
        self.drafter.load_state_dict(before)
        self.optimizer.load_state_dict(optimizer)
        return elapsed / steps


def start_from_last_layer(drafter: DraftModel, model: PreTrainedModel) -> None:
    """Start from the model's last layer and norm where they have the drafter's form.

    Otherwise, and for what has no counterpart, from random weights.
    """
    layer = find_layers(model)[-1].state_dict()
    own = drafter.layer.state_dict()
    shapes = {name: value.shape for name, value in layer.items()}
    if shapes == {name: value.shape for name, value in own.items()}:
        drafter.layer.load_state_dict(layer)
    hidden = drafter.shape.hidden_size
    with torch.no_grad():
        drafter.combine.weight[:, -hidden:] += torch.eye(hidden)


def _batches(texts: Sequence[OwnText], settings: FitSettings) -> list[list[int]]:
    """Indices of texts, of similar length and batch_tokens tokens in all, padding included."""
    lengths = [min(len(text.tokens), settings.length) for text in texts]
    batches: list[list[int]] = []
    current: list[int] = []
    for index in sorted(range(len(texts)), key=lambda i: (lengths[i], i)):
        if current and (len(current) + 1) * lengths[index] > settings.batch_tokens:
            batches.append(current)
            current = []
        current.append(index)
    return [*batches, current] if current else batches


def _padded(texts: Sequence[OwnText], length: int) -> tuple[Tensor, Tensor]:
    """Tokens [texts, longest] and which of them the model wrote."""
    rows = [text.tokens[:length] for text in texts]
    # attention's kernels want aligned rows
    width = -(-max(map(len, rows)) // _ALIGNMENT) * _ALIGNMENT
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    counted = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        counted[index, text.generated : len(row)] = True
    return tokens, counted


def _places(where: Tensor) -> Tensor:
    """Indices of what is true in `where`, counted through all of its rows."""
    return where.flatten().nonzero().squeeze(1)


def _pruned(head: nn.Linear, tokens: Tensor) -> nn.Linear:
    """`head` with its rows of `tokens` only."""
    bias = None if head.bias is None else head.bias[tokens]
    pruned = nn.Linear(head.in_features, len(tokens), bias is not None, device="meta")
    rows = {"weight": head.weight[tokens]} | ({} if bias is None else {"bias": bias})
    pruned.load_state_dict(rows, assign=True)
    return pruned.requires_grad_(False)


def _shifted(x: Tensor, by: int) -> Tensor:
    """`x` [batch, tokens, ..] with position t + by at t, zero beyond the end."""
    result = torch.zeros_like(x)
    result[:, : x.shape[1] - by] = x[:, by:]
    return result


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}

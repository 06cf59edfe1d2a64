"""Fit V6 risk probes and learned probes."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedac_export.exits.replay.probes import LearnedProbe, LREProbe

Loss = Callable[[nn.Module, Tensor], Tensor]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Train in one thread: products this small lose more by sharing than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Fit:
    """How long and how fast to train."""

    epochs: int
    rate: float
    batch: int = 4096
    decay: float = 0.02


def train(model: nn.Module, loss: Loss, examples: int, held_out: int, fit: Fit) -> float:
    """Fit `model` to the first `examples` of loss's data; its loss on the `held_out` that follow.

    loss takes the model and indices. After each epoch the held-out loss decides which weights are
    kept, so training longer does no harm. AdamW, one cycle of the learning rate.
    """
    steps = max(1, math.ceil(examples / fit.batch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.rate, weight_decay=fit.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, fit.rate, total_steps=steps * fit.epochs
    )
    generator = torch.Generator().manual_seed(0)
    best, kept = math.inf, {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(fit.epochs):
        model.train()
        for indices in torch.split(torch.randperm(examples, generator=generator), fit.batch):
            optimizer.zero_grad()
            torch.autograd.backward(loss(model, indices))
            optimizer.step()
            schedule.step()
        value = evaluate(model, loss, torch.arange(examples, examples + held_out), fit.batch)
        if value < best:
            best, kept = value, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    model.eval()
    return best


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, indices: Tensor, batch: int) -> float:
    """The mean of `loss` over `indices`."""
    model.eval()
    total = 0.0
    for part in torch.split(indices, batch):
        total += float(loss(model, part)) * len(part)
    return total / max(1, len(indices))


def risk_target(entropies: Tensor) -> Tensor:
    """log(1 + entropy) of the full depth, clamped to its 1st and 99th percentile."""
    target = torch.log1p(entropies)
    ordered = target.sort().values
    last = len(ordered) - 1
    return target.clamp(float(ordered[round(0.01 * last)]), float(ordered[round(0.99 * last)]))


def train_risk(
    hidden: Tensor, target: Tensor, held_out: int, fit: Fit | None = None
) -> tuple[LREProbe, float]:
    """A V6 probe for hidden states [n, hidden] and targets [n]; its held-out Huber loss (0.5)."""
    torch.manual_seed(0)
    probe = LREProbe(hidden.shape[-1])

    def loss(model: nn.Module, indices: Tensor) -> Tensor:
        return F.smooth_l1_loss(
            model(hidden[indices].float()).squeeze(-1), target[indices], beta=0.5
        )

    chosen = fit or Fit(epochs=3, rate=3e-3)
    return probe, train(probe, loss, len(hidden) - held_out, held_out, chosen)


def train_learned(
    normed: Tensor, scalars: Tensor, agrees: Tensor, held_out: int, fit: Fit | None = None
) -> tuple[LearnedProbe, float]:
    """A learned probe for [n, width], [n, SCALARS] and bool [n]; its held-out cross entropy.

    It is trained on scaled inputs and returned for the raw ones.
    """
    torch.manual_seed(0)
    probe = LearnedProbe(normed.shape[-1])
    examples = len(normed) - held_out
    scale = normed[: min(examples, 20000)].float().std().clamp(min=1e-6)
    mean = scalars[:examples].mean(0)
    deviation = scalars[:examples].std(0).clamp(min=1e-4)
    known = agrees.float()

    def loss(model: nn.Module, indices: Tensor) -> Tensor:
        inputs = normed[indices].float() / scale, (scalars[indices] - mean) / deviation
        return F.binary_cross_entropy_with_logits(model(*inputs).squeeze(-1), known[indices])

    value = train(probe, loss, examples, held_out, fit or Fit(epochs=5, rate=4e-3))
    probe.fold(scale, mean, deviation)
    return probe, value


def ranking(scores: Tensor, right: Tensor) -> float | None:
    """Area under the ROC curve: the chance that a right one scores above a wrong one.

    None where all are right, or all wrong.
    """
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(len(scores), dtype=torch.float64)
    good = int(right.sum())
    bad = len(right) - good
    if not good or not bad:
        return None
    return float((ranks[right].sum() - good * (good - 1) / 2) / good / bad)

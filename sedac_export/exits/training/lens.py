"""Lenses: maps after which the head says of an exit's state what full depth says.

An affine one is the tuned lens (Belrose et al. 2023, https://arxiv.org/abs/2303.08112), an MLP the
exit adapter of EE-Tuning (Pan et al. 2024, https://arxiv.org/abs/2402.00518). The model stays as
it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedac_export.exits.training.fit_probes import Fit, train
from sedac_export.exits.training.head_torch import TorchHead

# tokens to train on, and held-out tokens that decide when to stop: each costs a few
# passes through the head, the most expensive part of the model for one layer's work
MOST_TOKENS, MOST_HELD_OUT = 65_536, 8_192
_ROWS = 512

LensKind = Literal["affine", "mlp"]


class Adapter(nn.Module):
    """x + down(silu(gate(norm x)) * up(norm x)) of hidden states [.., hidden], at first x.

    The MLP is as wide as the hidden state: its weights are three times an affine lens's.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, hidden, bias=False)
        self.down = nn.Linear(hidden, hidden, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the head reads instead of x."""
        normed = self.norm(x)
        change: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return x + change


Lens = nn.Linear | Adapter


@dataclass(frozen=True)
class LensRow:
    """The head on held-out states, plain and through the lens, and whether the lens is kept.

    kl: from full depth's distribution, in nats. agreement: share of tokens that are full depth's.
    bytes: of the lens, fp32.
    """

    kl: float
    lens_kl: float
    agreement: float
    lens_agreement: float
    kept: bool
    bytes: int


def train_lens(
    head: TorchHead,
    states: Tensor,
    full: Tensor,
    held_out: int,
    kind: LensKind = "affine",
    fit: Fit | None = None,
) -> tuple[Lens | None, LensRow]:
    """A lens for states [n, hidden] of one depth, and full depth's [n, hidden] of the same tokens.

    It starts as the identity. None where the last `held_out` tokens are no better with it.
    """
    torch.manual_seed(0)
    make, usual = _KINDS[kind]
    lens = make(states.shape[-1])
    examples = len(states) - held_out
    chosen = _some(0, examples, MOST_TOKENS)
    stopping = _some(examples, len(states), MOST_HELD_OUT)
    rows = torch.cat([chosen, stopping])

    def loss(model: nn.Module, indices: Tensor) -> Tensor:
        here = rows[indices]
        with torch.no_grad():
            wanted = head(full[here].float())
        return divergence(wanted, head(model(states[here].float()))).mean()

    train(lens, loss, len(chosen), len(stopping), fit or usual)
    row = judge(head, lens, states[-held_out:], full[-held_out:])
    return lens if row.kept else None, row


def identity(size: int) -> nn.Linear:
    """The lens that changes nothing."""
    lens = nn.Linear(size, size)
    with torch.no_grad():
        lens.weight.copy_(torch.eye(size))
        lens.bias.zero_()
    return lens


# no decay: it would pull an affine lens towards zero, not towards the identity
_KINDS: dict[LensKind, tuple[Callable[[int], Lens], Fit]] = {
    "affine": (identity, Fit(epochs=2, rate=1e-3, batch=256, decay=0)),
    "mlp": (Adapter, Fit(epochs=3, rate=1e-3, batch=256, decay=0)),
}


def divergence(wanted: Tensor, given: Tensor) -> Tensor:
    """KL(wanted || given) of logits [n, vocabulary]: nats, [n]."""
    logs = given.log_softmax(-1), wanted.log_softmax(-1)
    return F.kl_div(*logs, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def tokens_through(head: TorchHead, lens: Lens, states: Tensor) -> Tensor:
    """The head's tokens of states [n, hidden] through the lens, int64 [n]."""
    parts = torch.split(states, _ROWS)
    return torch.cat([head(lens(part.float())).argmax(-1) for part in parts])


@torch.no_grad()
def judge(head: TorchHead, lens: Lens, states: Tensor, full: Tensor) -> LensRow:
    """What `lens` changes for states and full depth's of the same tokens, both [n, hidden]."""
    sums = torch.zeros(4, dtype=torch.float64)
    for part, end in zip(torch.split(states, _ROWS), torch.split(full, _ROWS), strict=True):
        wanted = head(end.float())
        both = head(part.float()), head(lens(part.float()))
        apart = [divergence(wanted, given).sum() for given in both]
        agree = [(given.argmax(-1) == wanted.argmax(-1)).sum() for given in both]
        sums += torch.stack([*apart, *agree])
    kl, lens_kl, agreement, lens_agreement = (sums / len(states)).tolist()
    bytes_ = 4 * sum(p.numel() for p in lens.parameters())
    return LensRow(kl, lens_kl, agreement, lens_agreement, lens_kl < kl, bytes_)


def _some(first: int, end: int, most: int) -> Tensor:
    """At most `most` of the rows from `first` to `end`, at random."""
    generator = torch.Generator().manual_seed(0)
    return first + torch.randperm(end - first, generator=generator)[:most]

"""The trained parts of an exit: V6 risk probes and the learned probe."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RISK_WIDTH = 64
LEARNED_WIDTH = 64
# logarithms of the two largest probabilities, both themselves, minus the entropy, 3 stabilities
SCALARS = 8


class LREProbe(nn.Module):
    """SEDAC V6: hidden states [.., hidden] -> risk [.., 1], an estimate of log(1 + entropy)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, RISK_WIDTH, bias=False)
        self.norm = nn.LayerNorm(RISK_WIDTH)
        self.up = nn.Linear(RISK_WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The risk."""
        return F.softplus(self.up(self.norm(self.down(x))))


class LearnedProbe(nn.Module):
    """Whether the exit's token is full depth's: a layer of ReLUs beside a linear path.

    normed [.., width], the head's normed hidden state, and scalars [.., SCALARS] -> logit [.., 1].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(width, LEARNED_WIDTH, bias=False)
        self.scalars = nn.Linear(SCALARS, LEARNED_WIDTH)
        self.linear = nn.Linear(SCALARS, 1)
        self.up = nn.Linear(LEARNED_WIDTH, 1, bias=False)
        self.drop = nn.Dropout(0.2)

    def forward(self, normed: Tensor, scalars: Tensor) -> Tensor:
        """The logit."""
        inner = torch.relu(self.state(self.drop(normed)) + self.scalars(scalars))
        logit: Tensor = self.up(self.drop(inner)) + self.linear(scalars)
        return logit

    def fold(self, scale: Tensor, mean: Tensor, deviation: Tensor) -> None:
        """Make a probe of normed / scale and (scalars - mean) / deviation one of the raw ones."""
        with torch.no_grad():
            self.state.weight /= scale
            for layer in (self.scalars, self.linear):
                layer.weight /= deviation
                layer.bias.copy_(layer.bias - layer.weight @ mean)

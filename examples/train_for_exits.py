"""Fine-tune a model for early exits: layer dropout, and a loss at every few layers (LayerSkip).

Elhoushi et al. 2024, https://arxiv.org/abs/2404.16710. docs/guides/train-for-exits.md explains it.

    python examples/train_for_exits.py MODEL OUTPUT --data texts/*.txt --steps 2000 --device cuda
"""

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from sedac_export.model.decoder import find_layers, replaced

# share of the sequences that skip the last layer; layers before it are skipped less often
DEEPEST_DROPOUT = 0.1
HELD_OUT = 0.05
HELD_OUT_BATCHES = 8


class ExitLosses:
    """A model's losses at its exits and at its last layer."""

    def __init__(self, model: torch.nn.Module, exit_every: int) -> None:
        self.model, self.layers = model, find_layers(model)
        self.exits = range(exit_every, len(self.layers), exit_every)

    def __call__(self, tokens: torch.Tensor, dropout: float) -> dict[int, torch.Tensor]:
        """Cross-entropy in nats by depth, of tokens [batch, length].

        The last layer is skipped in a share `dropout` of the sequences.
        """
        states: dict[int, torch.Tensor] = {}
        with self._running(states, dropout):
            losses = {len(self.layers): self._cross_entropy(tokens)}
        for depth in self.exits:
            with self._starting_from(states[depth]):
                losses[depth] = self._cross_entropy(tokens)
        return losses

    def weighted(self, losses: dict[int, torch.Tensor]) -> torch.Tensor:
        """The last layer's loss, and as much again for all exits together, deeper ones more."""
        early = sum(depth * losses[depth] for depth in self.exits) / sum(self.exits)
        return losses[len(self.layers)] + early

    def _cross_entropy(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @contextlib.contextmanager
    def _running(self, states: dict[int, torch.Tensor], dropout: float) -> Iterator[None]:
        """Layers drop out, and leave their hidden states [batch, length, hidden] in `states`."""
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                share = dropout * (2 ** (index / (len(self.layers) - 1)) - 1)

                def run(hidden, *rest, _forward=layer.forward, _depth=index + 1, _p=share, **named):
                    output = _forward(hidden, *rest, **named)
                    after = output[0] if isinstance(output, tuple) else output
                    keep = torch.rand(len(hidden), 1, 1, device=hidden.device) >= _p
                    states[_depth] = torch.where(keep, after, hidden)
                    return (states[_depth],) if isinstance(output, tuple) else states[_depth]

                stack.enter_context(replaced(layer, run))
            yield

    @contextlib.contextmanager
    def _starting_from(self, state: torch.Tensor) -> Iterator[None]:
        """No layer runs: the model's norm and head get `state`."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(replaced(layer, lambda *_, **__: state))
            yield


def read_tokens(tokenizer, files: list[Path]) -> torch.Tensor:
    """All texts one after the other, int64 [tokens]."""
    parts = [tokenizer(path.read_text(encoding="utf-8")).input_ids for path in files]
    return torch.tensor([token for part in parts for token in part])


def windows(tokens: torch.Tensor, count: int, length: int, device: str) -> torch.Tensor:
    """Random pieces [count, length]."""
    starts = torch.randint(0, len(tokens) - length + 1, (count, 1))
    return tokens[starts + torch.arange(length)].to(device)


@torch.no_grad()
def held_out_losses(losses: ExitLosses, batches: list[torch.Tensor]) -> dict[int, float]:
    """Means over `batches` by depth, without dropout."""
    losses.model.eval()
    found = [losses(batch, dropout=0.0) for batch in batches]
    return {depth: sum(float(each[depth]) for each in found) / len(found) for depth in found[0]}


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: a short warm-up, then a cosine to a twentieth."""
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(losses: ExitLosses, tokens: torch.Tensor, options: argparse.Namespace) -> None:
    """Train the model of `losses` in place on random pieces of `tokens`."""
    model = losses.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, options.steps)
    )
    for _ in track(range(options.steps), description="train"):
        batch = windows(tokens, options.batch_size, options.length, options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            loss = losses.weighted(losses(batch, DEEPEST_DROPOUT))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def positive(text: str) -> int:
    """A count on the command line."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def command_line() -> argparse.ArgumentParser:
    """What the script takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of a model that transformers loads, or a hub id")
    parser.add_argument("output", type=Path, help="directory for the trained model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="UTF-8 texts")
    parser.add_argument("--steps", type=positive, default=2000)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--length", type=positive, default=512, help="tokens in a sequence")
    parser.add_argument("--exit-every", type=positive, default=3, help="layers between exits")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def main() -> None:
    """Train, print losses before and after, and save."""
    parser = command_line()
    options = parser.parse_args()
    torch.manual_seed(0)
    try:
        # what cannot be written is better known before the training
        options.output.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokens = read_tokens(tokenizer, options.data)
    except (OSError, UnicodeDecodeError) as error:
        parser.error(" ".join(str(error).split()))
    held_out = max(options.length, round(HELD_OUT * len(tokens)))
    if len(tokens) < held_out + options.length:
        parser.error(
            f"--data has {len(tokens)} tokens, fewer than two sequences of --length"
            f" {options.length}; give more text or a smaller length"
        )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    losses = ExitLosses(model.to(options.device), options.exit_every)
    if not losses.exits:
        parser.error(
            f"--exit-every {options.exit_every} leaves no exit before the last of"
            f" {len(losses.layers)} layers; give a smaller number"
        )
    batches = [
        windows(tokens[-held_out:], options.batch_size, options.length, options.device)
        for _ in range(HELD_OUT_BATCHES)
    ]
    before = held_out_losses(losses, batches)
    train(losses, tokens[:-held_out], options)
    after = held_out_losses(losses, batches)
    for depth in sorted(after):
        print(f"layer {depth}: loss {before[depth]:.3f}, trained {after[depth]:.3f}")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()

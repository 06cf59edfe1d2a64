"""Train the demo decoder: a small Llama on Python source code, with early-exit losses.

The model learns from the Python files installed on the machine that runs this script. Every
second layer is also asked for the next token through the model's own norm and head, and layers are
dropped at random more often the deeper they are (LayerSkip, Elhoushi et al. 2024,
https://arxiv.org/abs/2404.16710), so that leaving early costs quality gradually instead of at once.

The standard library's modules in HELD_OUT are left out, to serve as evaluation text; a package that
vendors a copy of one of them may still bring it in.
Needs a CUDA device, torch, transformers and tokenizers. Roughly ten minutes on a datacentre GPU:

    python demo/train.py --output demo/model --minutes 8
"""

import argparse
import hashlib
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = frozenset(
    [
        "asyncio",
        "email",
        "argparse",
        "http",
        "logging",
        "json",
        "tarfile",
        "zipfile",
        "difflib",
        "typing",
        "inspect",
        "unittest",
    ]
)
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
SEQUENCE = 1024
BATCH = 128
PEAK_LEARNING_RATE = 2e-3
EXIT_EVERY = 2
DEEPEST_DROPOUT = 0.1


def python_sources() -> Iterator[str]:
    """Every distinct Python file of the installation that is neither tiny, huge nor held out."""
    paths = sysconfig.get_paths()
    seen: set[bytes] = set()
    for root in (Path(paths["purelib"]), Path(paths["stdlib"])):
        for path in sorted(root.rglob("*.py")):
            top = path.relative_to(root).parts[0].removesuffix(".py")
            if root == Path(paths["stdlib"]) and top in HELD_OUT | {
                "site-packages",
                "dist-packages",
            }:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if 200 < len(text) < 300_000 and digest not in seen:
                seen.add(digest)
                yield text


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE of VOCABULARY entries, the end-of-text token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one int32 [tokens] tensor on the GPU, an end-of-text before each."""
    parts = []
    for start in range(0, len(documents), 2000):
        encodings = tokenizer.encode_batch(documents[start : start + 2000])
        parts += [np.asarray([0, *encoding.ids], dtype=np.int32) for encoding in encodings]
    return torch.from_numpy(np.concatenate(parts)).cuda()


def decoder(layers: int) -> LlamaForCausalLM:
    """The untrained demo model, small enough to be carried in the repository."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=480,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).cuda().train()


class ExitLosses(torch.nn.Module):
    """Cross entropy at the last layer and, weighted by depth, at every exit layer."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        layers = model.config.num_hidden_layers
        self.exits = tuple(range(EXIT_EVERY, layers, EXIT_EVERY))
        self.register_buffer("positions", torch.arange(SEQUENCE, device="cuda")[None])

    def cross_entropy(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.model.lm_head(self.model.model.norm(hidden)).float()
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    def forward(
        self, tokens: torch.Tensor, target: torch.Tensor, keep: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """tokens, target: [batch, SEQUENCE]; keep: [layers] of 0 or 1. Last loss, exit losses."""
        inner = self.model.model
        hidden = inner.embed_tokens(tokens)
        rotary = inner.rotary_emb(hidden, self.positions)
        early = []
        for index, layer in enumerate(inner.layers):
            output = layer(hidden, position_ids=self.positions, position_embeddings=rotary)
            output = output[0] if isinstance(output, tuple) else output
            hidden = hidden + (output - hidden) * keep[index]
            if index + 1 in self.exits:
                early.append(self.cross_entropy(hidden, target))
        return self.cross_entropy(hidden, target), early

    def total(self, last: torch.Tensor, early: list[torch.Tensor]) -> torch.Tensor:
        weights = [depth / sum(self.exits) for depth in self.exits]
        return last + sum(weight * loss for weight, loss in zip(weights, early, strict=True))


def sample(data: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`batch` random windows as (tokens, next tokens), each int64 [batch, SEQUENCE]."""
    starts = torch.randint(0, len(data) - SEQUENCE - 1, (batch,), device="cuda")
    window = data[starts[:, None] + torch.arange(SEQUENCE + 1, device="cuda")[None]].long()
    return window[:, :-1], window[:, 1:]


def learning_rate(step: int, done: float) -> float:
    """Linear warm-up over 200 steps, then a cosine from the peak to a twentieth of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 200) * (0.05 + 0.95 * cosine)


def optimizer_for(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def train(losses: ExitLosses, data: torch.Tensor, minutes: float) -> None:
    """Optimise for `minutes` of wall-clock time, compilation not counted."""
    layers = losses.model.config.num_hidden_layers
    drop = [DEEPEST_DROPOUT * (2 ** (index / (layers - 1)) - 1) for index in range(layers)]
    dropout = torch.tensor(drop, device="cuda")
    compiled = torch.compile(losses)
    optimizer = optimizer_for(losses)
    started = None
    step, done = 0, 0.0
    while done < 1:
        tokens, target = sample(data, BATCH)
        keep = (torch.rand(layers, device="cuda") > dropout).float()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            last, early = compiled(tokens, target, keep)
        losses.total(last, early).backward()
        torch.nn.utils.clip_grad_norm_(losses.parameters(), 1.0)
        if started is None:
            torch.cuda.synchronize()
            started = time.monotonic()
        done = (time.monotonic() - started) / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, min(done, 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 250 == 0:
            print(f"step {step} loss {last.item():.3f} done {done:.2f}", flush=True)
    print(f"trained on {step * BATCH * SEQUENCE / 1e6:.0f} M tokens")


@torch.no_grad()
def validate(losses: ExitLosses, data: torch.Tensor) -> None:
    """Print the loss of every exit layer and of the last on files left out at random."""
    keep = torch.ones(losses.model.config.num_hidden_layers, device="cuda")
    rows = []
    for _ in range(20):
        tokens, target = sample(data, 32)
        last, early = losses(tokens, target, keep)
        rows.append([loss.item() for loss in (*early, last)])
    depths = (*losses.exits, losses.model.config.num_hidden_layers)
    means = np.mean(rows, axis=0)
    print({depth: round(float(loss), 3) for depth, loss in zip(depths, means, strict=True)})


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path, shard: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output, max_shard_size=shard)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )
    wrapped.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo/model"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shard", default="1GB", help="largest file of weights")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    documents = list(python_sources())
    np.random.default_rng(0).shuffle(documents)
    tokenizer = train_tokenizer(documents[:4000])
    held_out = len(documents) // 100
    validation = encode(tokenizer, documents[:held_out])
    data = encode(tokenizer, documents[held_out:])
    print(f"{len(documents)} files, {len(data) / 1e6:.0f} M tokens", flush=True)
    losses = ExitLosses(decoder(arguments.layers))
    train(losses, data, arguments.minutes)
    validate(losses, validation)
    save(losses.model, tokenizer, arguments.output, arguments.shard)


if __name__ == "__main__":
    main()

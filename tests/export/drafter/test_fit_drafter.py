"""Training on the drafter's own rollout: it learns, and goes on after a break as without one."""

from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from sedac_export.drafter.draft_corpus import DraftCorpus, OwnText
from sedac_export.drafter.draft_model import DrafterShape, DraftModel
from sedac_export.drafter.fit_drafter import (
    CHECKPOINT,
    Fit,
    FitSettings,
    FrozenModel,
    start_from_last_layer,
)
from sedac_export.errors import SedacError

SETTINGS = FitSettings(steps=60, batch_tokens=256, length=64)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def texts(model: PreTrainedModel) -> list[OwnText]:
    """Texts that the model writes greedily after two tokens."""
    starts = torch.tensor([[first, second] for first in range(6) for second in range(6)])
    written = model.generate(
        starts, attention_mask=torch.ones_like(starts), max_new_tokens=40, do_sample=False
    )
    return [OwnText(row, 2) for row in written.tolist()]


def _fit(model: PreTrainedModel, folder: Path | None = None, steps: int = 60) -> Fit:
    torch.manual_seed(0)
    shape = DrafterShape.of(model)
    drafter = DraftModel(shape)
    start_from_last_layer(drafter, model)
    frozen = FrozenModel(model, shape.feature_layers, torch.arange(shape.vocab_size))
    return Fit(drafter, frozen, FitSettings(steps, SETTINGS.batch_tokens, SETTINGS.length), folder)


def _silent(*_: object) -> None:
    """Progress that nobody watches."""


def test_training_lowers_the_loss_and_raises_acceptance(
    model: PreTrainedModel, texts: list[OwnText]
) -> None:
    fit = _fit(model)
    fit.run(texts[6:], texts[:6], _silent)
    losses = fit.state.losses
    # it cannot fall below the entropy of the model's own distributions, so no share is asked for
    assert max(losses[-5:]) < min(losses[:5])
    first, best = fit.state.evaluations[0], fit.state.best()
    assert best.tokens_per_round > first.tokens_per_round
    assert best.accuracy[0] > first.accuracy[0]


def test_a_resumed_training_is_the_same(
    model: PreTrainedModel, texts: list[OwnText], tmp_path: Path
) -> None:
    whole = _fit(model, steps=12)
    whole.run(texts[6:], texts[:6], _silent)
    broken = _fit(model, tmp_path, steps=12)
    broken.run(texts[6:], texts[:6], _silent, deadline=lambda: broken.state.step == 5)
    assert broken.state.step == 5
    resumed = _fit(model, tmp_path, steps=12)
    assert resumed.resume(12)
    resumed.run(texts[6:], texts[:6], _silent)
    assert resumed.state.losses == whole.state.losses
    for name, value in whole.drafter.state_dict().items():
        assert torch.equal(resumed.drafter.state_dict()[name], value), name


def test_a_damaged_checkpoint_is_named(
    model: PreTrainedModel, texts: list[OwnText], tmp_path: Path
) -> None:
    fit = _fit(model, tmp_path, steps=2)
    fit.run(texts[6:], texts[:6], _silent)
    checkpoint = tmp_path / CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(SedacError, match="delete it"):
        _fit(model, tmp_path, steps=2).resume(2)


def test_on_the_cpu_a_deadline_is_seen_after_each_step(
    model: PreTrainedModel, texts: list[OwnText]
) -> None:
    fit, seen = _fit(model, steps=60), list[int]()
    late = lambda: len(seen) == 2  # noqa: E731
    fit.run(texts[6:], texts[:6], lambda done, _: seen.append(done), late)
    assert seen == [1, 2]


def test_the_model_keeps_its_head(texts: list[OwnText]) -> None:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    some = torch.arange(5, 64, 3)
    tokens = torch.tensor([texts[0].tokens])
    with torch.no_grad():
        whole = model(tokens).logits
        _, logits, _ = FrozenModel(model, (1, 2), some).run(tokens)
        assert torch.equal(model(tokens).logits, whole)
    torch.testing.assert_close(logits, whole[..., some])


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(
    model: PreTrainedModel, texts: list[OwnText], tmp_path: Path
) -> None:
    fit = _fit(model, tmp_path, steps=2)
    fit.run(texts[6:], texts[:6], _silent)
    assert not _fit(model, tmp_path, steps=3).resume(3)


def test_a_damaged_corpus_is_named(texts: list[OwnText], tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    DraftCorpus(texts[6:], texts[:6]).save(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(SedacError, match="delete it"):
        DraftCorpus.load(path)


def test_a_corpus_is_read_as_it_was_written(texts: list[OwnText], tmp_path: Path) -> None:
    corpus = DraftCorpus(texts[6:], texts[:6])
    corpus.save(tmp_path / "corpus.jsonl")
    assert DraftCorpus.load(tmp_path / "corpus.jsonl") == corpus
    written = [token for text in corpus.training for token in text.tokens[2:]]
    frequent = corpus.frequent_tokens(64, 5).tolist()
    assert frequent == sorted(frequent)
    least = min(written.count(token) for token in frequent)
    assert all(written.count(token) <= least for token in range(64) if token not in frequent)

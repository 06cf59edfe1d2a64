"""Make the bundle that the fuzzer changes, and the corpus: each of its files after its number.

From the repository's root, after a change of the bundle's format:

    PYTHONPATH=tests .venv/bin/python sedac-core/fuzz/seed.py
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from certificates import certificate_of, write_certified
from tiny_models import save_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sedac_export import BuildRequest, build_bundle
from sedac_export.bundle import Bundle
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.bundle.manifest import EXIT_CONFIG
from sedac_export.drafter.add_drafter import add_drafter
from sedac_export.drafter.draft_model import DrafterShape, DraftModel
from sedac_export.drafter.drafter_file import DRAFTER, SAMPLED_ROWS, DrafterFile
from sedac_export.exits.replay.documents import read_documents
from sedac_export.exits.training.train_probes import train_probes

HERE = Path(__file__).parent
BUNDLE, CORPUS = HERE / "bundle", HERE / "corpus" / "first_token"
EXIT, DRAFTED_TOKENS = 1, 64
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def save_tokenizer(directory: Path) -> None:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def save_drafter(model: PreTrainedModel, path: Path) -> None:
    """A drafter of random weights that drafts the first tokens."""
    tokens = torch.arange(DRAFTED_TOKENS)
    sample = model.lm_head.weight[tokens[:SAMPLED_ROWS]]
    torch.manual_seed(0)
    DrafterFile(DraftModel(DrafterShape.of(model)), tokens, sample, {}).save(path)


def build_fuzzed_bundle(work: Path) -> None:
    """With probes, an exit adapter and a drafter, and a policy that reads them."""
    model = save_tiny_model("llama", work / "model", **SIZES)
    save_tokenizer(work / "model")
    build_bundle(BuildRequest(model=str(work / "model"), output=BUNDLE, force=True))
    texts = [Path(__file__), HERE / "fuzz_targets" / "first_token.rs"]
    documents = read_documents(Bundle.open(BUNDLE), texts)
    trained = train_probes(BUNDLE, documents, [EXIT], [EXIT], lenses=["mlp"])
    assert EXIT in trained.lenses, "the adapter was left out: it does not help"
    save_drafter(model, work / DRAFTER)
    add_drafter(BUNDLE, work / DRAFTER)
    config = ExitConfig(policy="learned", thresholds={EXIT: 0.5})
    (BUNDLE / EXIT_CONFIG).write_text(config.to_json())


def save_seed(name: str, number: int, contents: Path) -> None:
    """Write the seed `name`: the bundle's file `number` holds what `contents` does."""
    (CORPUS / name).write_bytes(bytes([number]) + contents.read_bytes())


def main() -> None:
    """Entry point."""
    shutil.rmtree(CORPUS, ignore_errors=True)
    CORPUS.mkdir(parents=True)
    with TemporaryDirectory() as work:
        build_fuzzed_bundle(Path(work))
        files = sorted(path for path in BUNDLE.rglob("*") if path.is_file())
        for number, path in enumerate(files):
            save_seed(path.name, number, path)
        # drafts between exits, and a certificate
        write_certified(Path(work), certificate_of(BUNDLE, "early-exit"))
        number = files.index(BUNDLE / EXIT_CONFIG)
        save_seed(f"certified_{EXIT_CONFIG}", number, Path(work) / EXIT_CONFIG)


if __name__ == "__main__":
    main()

"""Make the bundle that the fuzzer changes, and the corpus: each of its files after its number.

From the repository's root, after a change of the bundle's format:

    PYTHONPATH=tests .venv/bin/python sedac-core/fuzz/seed.py
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny_models import save_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sedac_export import BuildRequest, build_bundle
from sedac_export.bundle import Bundle
from sedac_export.exits.replay.documents import read_documents
from sedac_export.exits.training.train_probes import train_probes

HERE = Path(__file__).parent
BUNDLE, CORPUS = HERE / "bundle", HERE / "corpus" / "first_token"
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


def build_fuzzed_bundle(work: Path) -> None:
    """With probes and a lens, so that exits are fuzzed too."""
    save_tiny_model("llama", work / "model", **SIZES)
    save_tokenizer(work / "model")
    build_bundle(BuildRequest(model=str(work / "model"), output=BUNDLE, force=True))
    texts = [Path(__file__), HERE / "fuzz_targets" / "first_token.rs"]
    documents = read_documents(Bundle.open(BUNDLE), texts)
    train_probes(BUNDLE, documents, [1], [1], lenses=["affine"])


def main() -> None:
    """Entry point."""
    with TemporaryDirectory() as work:
        build_fuzzed_bundle(Path(work))
    shutil.rmtree(CORPUS, ignore_errors=True)
    CORPUS.mkdir(parents=True)
    files = sorted(path for path in BUNDLE.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        seed = bytes([number]) + path.read_bytes()
        (CORPUS / path.name).write_bytes(seed)


if __name__ == "__main__":
    main()

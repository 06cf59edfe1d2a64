"""SEDAC beside other runtimes on SmolLM2-135M-Instruct, in fp32 and int4, on chat and code.

Prints a table for each: what `sedac-runtime bench --against` measures, over three prompts. The
weights come from a Q4_1 file: beside int4 llama.cpp runs it as it is, beside fp32 dequantized.

    make benchmark
"""

import argparse
from pathlib import Path

from smollm2 import SmolLM2
from transformers import AutoTokenizer

from sedac_runtime import bench_peers
from sedac_runtime.bench_table import markdown_table
from sedac_runtime.peer_models import PEERS, genai_model

CHAT = (
    "Explain photosynthesis to a ten-year-old.",
    "Give me a recipe for pancakes with quantities in grams.",
    "Name three differences between TCP and UDP and explain each of them.",
)
CODE = (
    "def reverse_linked_list(head):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import argparse\n\ndef parse_arguments():\n    parser = argparse.ArgumentParser()\n",
)


def encode(checkpoint: Path) -> dict[str, list[list[int]]]:
    """Token ids of the prompts, by kind."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chats = [[{"role": "user", "content": text}] for text in CHAT]
    return {
        "chat": [
            list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
            for chat in chats
        ],
        "code": [tokenizer(text)["input_ids"] for text in CODE],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("target/benchmark"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    model = SmolLM2(arguments.directory)
    checkpoint = str(model.checkpoint())
    for precision in ("fp32", "int4"):
        bundle, built = model.bundle(precision), arguments.directory / f"genai-{precision}"
        if not built.exists():
            genai_model(bundle, checkpoint, built)
        gguf_file = model.fp32_gguf_file() if precision == "fp32" else model.gguf_file
        models = {
            "onnxruntime-genai": str(built / "model"),
            "llama.cpp": str(gguf_file),
            "transformers": checkpoint,
        }
        for kind, prompts in encode(model.checkpoint()).items():
            rows = bench_peers(
                bundle,
                PEERS,
                peer_models=models,
                drafters=["auto"],
                prompts=prompts,
                new_tokens=arguments.new_tokens,
                repeat=arguments.rounds,
                threads=arguments.threads,
            )
            print(f"\n{precision}, {kind}:\n\n{markdown_table(rows)}", flush=True)


if __name__ == "__main__":
    main()

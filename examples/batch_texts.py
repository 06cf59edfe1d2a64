"""Continue every line of a file, with sampling, and write JSON lines.

One model generates one sequence at a time; the same seed gives the same text again.

    python examples/batch_texts.py engines/demo prompts.txt > continuations.jsonl
"""

import json
import sys
from pathlib import Path

from sedac_runtime import InputError, SedacModel

bundle, prompts = sys.argv[1:]
model = SedacModel.from_pretrained(bundle, threads=2)
for number, prompt in enumerate(Path(prompts).read_text(encoding="utf-8").splitlines()):
    try:
        output = model.generate(
            prompt,
            max_new_tokens=32,
            temperature=0.8,
            top_p=0.95,
            seed=number,
            stop_strings=["\n\n"],
        )
    except InputError as error:  # a prompt longer than the cache, for example
        print(f"line {number + 1}: {error}", file=sys.stderr)
        continue
    print(json.dumps({"prompt": prompt, "text": output.text, "finish": output.finish_reason}))

"""Generate full depth's text with drafts (lossless mode), and see what the drafts were worth.

python examples/generate_text.py engines/demo "def main():"
"""

import sys

from sedac_runtime import SedacModel

bundle, prompt = sys.argv[1:]
model = SedacModel.from_pretrained(bundle, threads=2)
output = model.generate(prompt, max_new_tokens=64)  # mode="lossless" is the default
print(prompt + output.text)
print(
    f"{output.decode_tokens_per_second:.0f} tokens/s,"
    f" {output.accepted} of {output.drafted} drafted tokens accepted",
    file=sys.stderr,
)

"""Stream tokens in exit mode, each with the number of layers that it took.

python examples/stream_exits.py engines/demo "def main():"
"""

import sys

from sedac_runtime import SedacModel

bundle, prompt = sys.argv[1:]
model = SedacModel.from_pretrained(bundle, threads=2)
# with the policy of the bundle's sedac_config.json; tau=..., policy=... would override it
with model.stream(prompt, mode="exit", max_new_tokens=32) as stream:
    for token in stream:
        print(f"{token.exit_layer:3d} {token.exit_reason:12} {token.text!r}")
print(f"mean exit layer {stream.output.mean_exit_layer:.1f} of {model.num_layers}")

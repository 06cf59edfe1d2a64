"""What is certified of a generation: at most this share of tokens differs from full depth's.

`sedac-export calibrate` writes it, for one setting; anything else is not certified.

    python examples/read_certificate.py engines/demo "def main():"
"""

import sys

from sedac_runtime import SedacModel

bundle, prompt = sys.argv[1:]
model = SedacModel.from_pretrained(bundle, threads=2)
for settings in ({}, {"temperature": 0.8}):
    output = model.generate(prompt, mode="exit", max_new_tokens=16, **settings)
    print(output.certification)
    if output.certificate is not None:
        bound, confidence = output.certificate["risk_bound"], output.certificate["confidence"]
        print(f"risk at most {bound:.2%} with confidence {confidence:.0%}")

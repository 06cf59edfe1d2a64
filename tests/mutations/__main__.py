"""python -m mutations BUNDLE --count 10000: judge so many mutations and print what must not be."""

import argparse
import sys
from pathlib import Path

from mutations.judge import Verdict, counts, judge


def main() -> None:
    """Print each bad verdict as it comes, then the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    verdicts: list[Verdict] = []
    for verdict in judge(arguments.bundle, arguments.count, arguments.seed):
        verdicts.append(verdict)
        if verdict.is_bad:
            told = (verdict.number, verdict.outcome, verdict.mutation.what, verdict.message[:200])
            print(*told, flush=True)
    print(dict(counts(verdicts)))
    sys.exit(any(verdict.is_bad for verdict in verdicts))


if __name__ == "__main__":
    main()

"""Certify a bound on risk from counted errors: Learn then Test with exact binomial bounds.

Risk is the share of tokens whose exit token differs from full depth's. The hypothesis "the risk is
above max_risk" is tested for settings in an order that was fixed before the data of the test were
looked at, safest first, each at the full level 1 - confidence, up to the first that is not
rejected: fixed sequence testing, which keeps the chance of certifying any setting whose risk is
above max_risk to 1 - confidence (Angelopoulos, Bates, Candès, Jordan, Lei 2021, "Learn then Test",
https://arxiv.org/abs/2110.01052, section 3).

What is assumed: the documents of the test are drawn at random from those that the setting will
meet, and none was used to train the probes or to choose the settings. Tokens of a document are
not independent, so the exact binomial (Clopper-Pearson) bound is not taken over the tokens as they
are but over an effective number of them: their number divided by the design effect that the spread
between documents shows, with Student's correction for few documents (Korn and Graubard 1998,
"Confidence intervals for proportions with small expected number of positive counts estimated from
survey data"). This is exact when tokens are independent and an approximation otherwise, a poor one
for fewer than some ten documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, t

from sedac_export.errors import SedacError

MIN_DOCUMENTS = 4
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Losses:
    """Wrong tokens and all tokens of each document, int64 [documents] each."""

    errors: Counts
    tokens: Counts

    @property
    def risk(self) -> float:
        """Share of all tokens that are wrong."""
        return float(self.errors.sum() / self.tokens.sum())

    def effective_tokens(self, confidence: float) -> float:
        """The number of independent tokens that would say as much about the risk."""
        total, count, risk = int(self.tokens.sum()), len(self.tokens), self.risk
        if not 0 < risk < 1:
            return total
        residuals = self.errors - risk * self.tokens
        variance = count / (count - 1) * float((residuals**2).sum()) / total**2
        effect = max(1.0, variance / (risk * (1 - risk) / total))
        student = float(t.ppf(confidence, total - 1) / t.ppf(confidence, count - 1))
        return total / effect * min(1.0, student) ** 2

    def upper_bound(self, confidence: float) -> float:
        """The Clopper-Pearson upper bound of the risk at `confidence`."""
        effective = self.effective_tokens(confidence)
        wrong = self.risk * effective
        return (
            1.0 if wrong >= effective else float(beta.ppf(confidence, wrong + 1, effective - wrong))
        )

    def p_value(self, max_risk: float, confidence: float) -> float:
        """The chance of so few errors if the risk were `max_risk`."""
        effective = self.effective_tokens(confidence)
        wrong = self.risk * effective
        return 1.0 if wrong >= effective else float(beta.sf(max_risk, wrong + 1, effective - wrong))


def count_certified(sequence: Sequence[Losses], max_risk: float, confidence: float) -> int:
    """How many of the first of `sequence` are certified to have at most `max_risk`.

    Raises SedacError when there are too few documents to tell their spread.
    """
    for number, losses in enumerate(sequence):
        check_enough(losses, max_risk, confidence)
        if losses.p_value(max_risk, confidence) > 1 - confidence:
            return number
    return len(sequence)


def check_enough(losses: Losses, max_risk: float, confidence: float) -> None:
    """Raise SedacError when not even a setting without errors could be certified."""
    if len(losses.tokens) < MIN_DOCUMENTS:
        raise SedacError(
            f"{len(losses.tokens)} documents are too few to certify on; give at least"
            f" {2 * MIN_DOCUMENTS} files, half of them choose the setting"
        )
    tokens = int(losses.tokens.sum())
    least = float(np.log(1 - confidence) / np.log1p(-max_risk))
    if tokens < least:
        raise SedacError(
            f"{tokens} tokens cannot certify a risk of {max_risk:g} at confidence {confidence:g},"
            f" not even without an error: that takes {least:.0f}; give more --data"
        )

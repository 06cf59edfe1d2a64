"""The advice as one page of Markdown."""

from collections.abc import Iterator

from sedac_export.advice.advise import Advice, CertifiedExit
from sedac_export.advice.recommendation import AdviceRow
from sedac_export.advice.speedup import CONFIDENCE
from sedac_export.advice.time_modes import NEW_TOKENS, ROUNDS


def advice_page(advice: Advice) -> str:
    """The page's text."""
    return "\n".join(_lines(advice)) + "\n"


def _lines(advice: Advice) -> Iterator[str]:
    yield f"**{advice.recommendation.sentence}**"
    yield ""
    yield from (f"    {command}" for command in advice.commands)
    yield ""
    yield (
        f"{advice.model}, weights {advice.precision}, on {advice.machine}: {NEW_TOKENS} greedy"
        f" tokens after each of {advice.prompts} prompts cut from the texts, {ROUNDS} interleaved"
        " rounds, each run without memory of earlier texts. Speed is of decoding, relative to full"
        f" depth, with its {CONFIDENCE:.0%} bootstrap interval over prompts; agreement is the share"
        " of tokens that full depth would have chosen after the same text."
    )
    yield ""
    yield "| mode | drafter | ms/token | speed | interval | agreement | layer ratio |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    yield from map(_row, advice.rows)
    yield ""
    yield from (f"- {_certificate(found, advice.confidence)}" for found in advice.exits)
    if advice.untried:
        yield ""
        yield "Not in this bundle, so not measured; add it and run advise again:"
        yield ""
        yield from (f"- {line}" for line in advice.untried)


def _row(row: AdviceRow) -> str:
    mode = row.mode if row.max_risk is None else f"{row.mode}, {100 * row.max_risk:g} % risk"
    speed = row.speedup
    return (
        f"| {mode} | {row.drafter} | {row.milliseconds:.2f} | {speed.value:.2f}x"
        f" | {speed.low:.2f} to {speed.high:.2f} | {row.agreement:.2%} | {row.layer_ratio:.2f} |"
    )


def _certificate(found: CertifiedExit, confidence: float) -> str:
    risk = f"{100 * found.max_risk:g} % risk"
    if found.config is None:
        return f"Exits at {risk}: {found.refusal}"
    return (
        f"Exits at {risk}: policy {found.config.policy}, layer ratio {found.layer_ratio:.3f};"
        f" {found.observed_risk:.2%} of {found.tokens} tokens in {found.documents} documents"
        f" differ, at most {found.risk_bound:.2%} with confidence {confidence:.0%}"
    )

"""What to recommend, from measured settings: the sentence at the top of the advice."""

from collections.abc import Sequence
from dataclasses import dataclass

from sedac_export.advice.speedup import Speedup
from sedac_runtime.choices import Drafter, Mode

# a setting that is faster by less is not worth naming
NOTABLE = 1.05

_DRAFTERS: dict[Drafter, str] = {
    "none": "no drafter",
    "auto": "the drafter auto",
    "early-exit": "early-exit drafts",
    "prompt-lookup": "prompt lookup",
    "trained": "the trained drafter",
}


@dataclass(frozen=True)
class AdviceRow:
    """A measured setting.

    max_risk: what the exits are certified at, None where no token exits. milliseconds: of a decoded
    token, the median. agreement: share of the generated tokens that full depth would have chosen
    after the same text. layer_ratio: the model's layers over the mean number of layers run.
    """

    mode: Mode
    drafter: Drafter
    max_risk: float | None
    milliseconds: float
    speedup: Speedup
    agreement: float
    layer_ratio: float

    @property
    def is_certain(self) -> bool:
        """Whether it is faster than full depth with confidence."""
        return self.speedup.low > 1.0

    @property
    def drafter_name(self) -> str:
        """The drafter in a sentence."""
        return _DRAFTERS[self.drafter]


@dataclass(frozen=True)
class Recommendation:
    """chosen: what to use where no token may differ. exits: what is faster where some may."""

    sentence: str
    chosen: AdviceRow
    exits: list[AdviceRow]


def recommend(rows: Sequence[AdviceRow], risks: Sequence[float]) -> Recommendation:
    """The advice on measured `rows`, full depth among them, with exits asked for at `risks`.

    What it chooses is faster than full depth with confidence, or is full depth. Of what it does not
    name, nothing was measured to be over NOTABLE times as fast.
    """
    (full,) = (row for row in rows if row.mode == "full")
    lossless = [row for row in rows if row.mode == "lossless"]
    chosen = max(filter(_certain, lossless), key=_speed, default=full)
    exits: list[AdviceRow] = []
    for risk in sorted(risks):
        best = max(
            (r for r in rows if r.max_risk == risk and r.is_certain), key=_speed, default=full
        )
        if _speed(best) > NOTABLE * max(_speed(row) for row in (chosen, *exits)):
            exits.append(best)
    clauses = [
        _choice(chosen, lossless),
        _exit_advice(rows, chosen, exits, risks),
        *_doubts(rows, chosen),
    ]
    return Recommendation("; ".join(clauses) + ".", chosen, exits)


def _choice(chosen: AdviceRow, lossless: Sequence[AdviceRow]) -> str:
    if chosen.mode == "lossless":
        return f"Use lossless mode with {chosen.drafter_name}: {_times(chosen)}"
    best = max(lossless, key=_speed)
    return (
        "Use full depth: no drafter is certain to be faster here"
        f" (at best {_times(best)}, {best.drafter_name})"
    )


def _exit_advice(
    rows: Sequence[AdviceRow],
    chosen: AdviceRow,
    exits: Sequence[AdviceRow],
    risks: Sequence[float],
) -> str:
    if exits:
        gains = (
            f"at {_percent(row.max_risk)} risk exit mode gives {_times(row)} with"
            f" {row.drafter_name} ({row.agreement:.1%} agreement)"
            for row in exits
        )
        return "where some tokens may differ, " + " and ".join(gains)
    gained = []
    for risk in risks:
        best = max((row for row in rows if row.max_risk == risk), key=_speed, default=None)
        result = "nothing is certified" if best is None else f"it saves {_saving(best, chosen)}"
        gained.append(f"at {_percent(risk)} risk {result}")
    return "do not exit early on this model: " + ", ".join(gained)


def _saving(row: AdviceRow, chosen: AdviceRow) -> str:
    """Share of the chosen setting's time that `row` does without."""
    share = round(1 - _speed(chosen) / _speed(row), 2)
    return f"{share:.0%}".replace("%", " %") if share > 0 else "nothing"


def _doubts(rows: Sequence[AdviceRow], chosen: AdviceRow) -> list[str]:
    """What may be faster, and takes more prompts to tell."""
    doubtful = [row for row in rows if not row.is_certain and row is not chosen]
    names = [
        f"{row.mode} mode with {row.drafter_name}"
        + ("" if row.max_risk is None else f" at {_percent(row.max_risk)} risk")
        + f" ({_times(row)}, {row.speedup.low:.2f} to {row.speedup.high:.2f})"
        for row in doubtful
        if _speed(row) > NOTABLE * _speed(chosen)
    ]
    return [f"more --prompts would tell about {', '.join(names)}"] if names else []


def _certain(row: AdviceRow) -> bool:
    return row.is_certain


def _speed(row: AdviceRow) -> float:
    return row.speedup.value


def _times(row: AdviceRow) -> str:
    return f"{row.speedup.value:.2f}x"


def _percent(risk: float | None) -> str:
    return f"{100 * (risk or 0):g} %"

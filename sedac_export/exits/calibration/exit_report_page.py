"""A report as one self-contained HTML file and PNGs."""

import base64
import io
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from sedac_export.exits.calibration.exit_report import Report

_TOKENS_SHOWN = 1500

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Exits of {{ report.model }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
pre { white-space: pre-wrap; font-size: 13px } img { max-width: 100% }
tr.own { font-weight: 600 }
</style>
<h1>Exits of {{ report.model }}</h1>
<p>{{ report.tokens }} tokens, teacher-forced, {{ report.num_layers }} layers. Speed is wall-clock
against full depth along these texts, without a drafter; agreement is the share of tokens that are
full depth's. The first row is the bundle's own setting:
{{ report.certification }}.
{%- if report.tolerance_note %}
<strong>The bundle is {{ report.tolerance_note }}.</strong>{% endif %}</p>
<table><tr><th>policy<th>settings<th>mean exit layer<th>layer ratio<th>speed<th>agreement
<th>perplexity<th>exit rate<th>high risk</tr>
{% for row in report.rows %}<tr{% if loop.first %} class="own"{% endif %}><td>{{ row.policy }}
<td>{{ describe(row) }}<td>{{ "%.2f" | format(row.mean_exit_layer) }}
<td>{{ "%.3f" | format(row.layer_ratio) }}<td>{{ "%.2f" | format(row.speedup) }}x
<td>{{ "%.2f" | format(100 * row.agreement) }} %
<td>{{ "%+.1f" | format(100 * row.perplexity_change) }} %
<td>{{ "%.1f" | format(100 * row.exit_rate) }} %
<td>{{ "%.1f" | format(100 * row.high_risk_rate) }} %</tr>
{% endfor %}</table>
{% for name, image in images %}<h2>{{ name }}</h2>
<img alt="{{ name }}" src="data:image/png;base64,{{ image }}">{% endfor %}
<h2>Where tokens exit</h2>
<p>The bundle's own setting; a token's colour is the depth of the pass that predicts what follows
it, from {{ colour(0) }} shallow to {{ colour(1) }} full depth.</p>
<pre>{% for text, background, depth in spans
%}<span style="background: {{ background }}" title="{{ depth }}">{{ text }}</span>{% endfor %}</pre>
</html>
"""


def write_report(report: Report, bundle: Path, output: Path) -> None:
    """Write report.html, pareto.png and depths.png into the directory `output`."""
    figures = {"pareto": _pareto(report), "depths": _histogram(report)}
    images = {name: _png(figure) for name, figure in figures.items()}
    page = (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            report=report,
            describe=lambda row: _describe(row.settings | {"kv_fill": row.kv_fill}),
            colour=_colour,
            images=[
                ("Speed and agreement", _inline(images["pareto"])),
                ("Exit depths", _inline(images["depths"])),
            ],
            spans=_spans(report, bundle),
        )
    )
    output.mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        (output / f"{name}.png").write_bytes(content)
    (output / "report.html").write_text(page, encoding="utf-8")


def _pareto(report: Report) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for policy in dict.fromkeys(row.policy for row in report.rows):
        rows = [row for row in report.rows if row.policy == policy]
        points = [100 * r.agreement for r in rows], [r.speedup for r in rows]
        axes.scatter(*points, label=policy, clip_on=False)
    own = report.rows[0]
    axes.scatter(
        [100 * own.agreement],
        [own.speedup],
        s=160,
        facecolors="none",
        edgecolors="black",
        clip_on=False,
        label="the bundle's own",
    )
    axes.set_xlabel("agreement with full depth, %")
    axes.set_ylabel("wall-clock speed against full depth")
    axes.set_xlim(right=100)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend()
    return figure


def _histogram(report: Report) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    depths = np.arange(1, report.num_layers + 1)
    shares = [100 * float((report.depths == depth).mean()) for depth in depths]
    axes.bar(depths, shares)
    axes.set_xlabel("layers run")
    axes.set_ylabel("tokens, %")
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _inline(image: bytes) -> str:
    return base64.b64encode(image).decode()


def _spans(report: Report, bundle: Path) -> list[tuple[str, str, int]]:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    return [
        (
            tokenizer.decode([token], skip_special_tokens=False),
            _colour(depth / report.num_layers),
            depth,
        )
        for token, depth in report.text[:_TOKENS_SHOWN]
    ]


def _colour(share: float) -> str:
    """A light colour for a share of the depth, green to red."""
    red, green, blue, _ = matplotlib.colormaps["RdYlGn_r"](share)
    mixed = (round(255 * (0.45 + 0.55 * part)) for part in (red, green, blue))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _describe(settings: dict[str, object]) -> str:
    parts = []
    for name, value in settings.items():
        if isinstance(value, dict):
            value = " ".join(f"{depth}:{number:.3g}" for depth, number in value.items())
        parts.append(f"{name} {value}")
    return ", ".join(parts)

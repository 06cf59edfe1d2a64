"""How far what a target computes is from the ONNX Runtime engines, and how far it may be."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sedac_export.arrays import Array


@dataclass(frozen=True)
class Gates:
    """What agreement must reach; rows are tokens.

    cosine: 5th percentile of the rows' cosines. difference: 95th percentile of the rows' relative
    L2 differences; also bounds the largest difference of stabilities. argmax: share of the rows
    of logits with the same largest, where two that are closer than epsilon, relatively, count as
    the same: the precision cannot tell them apart.
    """

    cosine: float
    difference: float
    argmax: float
    epsilon: float


GATES = {
    "fp32": Gates(0.99999, 0.001, 0.99, 2**-23),
    "fp16": Gates(0.999, 0.02, 0.99, 2**-10),
    "bf16": Gates(0.99, 0.1, 0.95, 2**-7),
}


@dataclass
class AgreementRow:
    """Agreement of one engine, or of the chain, with what it stands for."""

    engine: str
    stability: float = 0.0
    cosines: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    matches: list[bool] = field(default_factory=list)

    def add_logits(self, got: Array, expected: Array, epsilon: float) -> None:
        """Count rows of logits in, and whether they choose the same token."""
        self.add(got, expected)
        chosen = np.take_along_axis(expected, got.argmax(-1)[..., None], -1)
        top = expected.max(-1, keepdims=True)
        self.matches += (top - chosen <= epsilon * np.abs(top)).ravel().tolist()

    def add(self, got: Array, expected: Array) -> None:
        """Count the rows of an output [..., n] in."""
        size = expected.shape[-1]
        a, b = got.reshape(-1, size).astype(np.float64), expected.reshape(-1, size)
        norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
        cosine = (a * b).sum(-1) / np.maximum(norms[0] * norms[1], 1e-30)
        difference = np.linalg.norm(a - b, axis=-1) / np.maximum(norms[1], 1e-30)
        self.cosines += np.nan_to_num(cosine, nan=-1.0).tolist()
        self.differences += np.nan_to_num(difference, nan=np.inf).tolist()

    def add_stability(self, got: Array, expected: Array) -> None:
        """Count stabilities in, by their largest absolute difference."""
        difference = np.nan_to_num(np.abs(got - expected), nan=np.inf)
        self.stability = max(self.stability, float(difference.max()))

    def report(self, gates: Gates) -> dict[str, Any]:
        """The figures and whether they pass `gates`."""
        cosine = float(np.percentile(self.cosines, 5))
        difference = float(np.percentile(self.differences, 95))
        argmax = float(np.mean(self.matches)) if self.matches else None
        passed = cosine >= gates.cosine and difference <= gates.difference
        passed = passed and (argmax is None or argmax >= gates.argmax)
        passed = passed and self.stability <= gates.difference
        return {
            "engine": self.engine,
            "cosine_p5": cosine,
            "relative_l2_p95": min(difference, 1e9),
            "argmax_agreement": argmax,
            "stability_difference": min(self.stability, 1e9),
            "passed": bool(passed),
        }


def failures(reports: list[dict[str, Any]]) -> list[str]:
    """A line for each of the reports that does not pass."""
    return [
        f"{report['engine']}: cosine {report['cosine_p5']:.5f}, relative L2"
        f" {report['relative_l2_p95']:.4f}, stability off by {report['stability_difference']:.4f},"
        f" argmax agreement {report['argmax_agreement']}"
        for report in reports
        if not report["passed"]
    ]

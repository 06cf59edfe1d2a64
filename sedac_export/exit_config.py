"""sedac_config.json: the exit configuration, and the certificate of what it costs."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sedac_export.errors import SedacError
from sedac_export.manifest import EXIT_CONFIG, Manifest
from sedac_runtime import _core

PolicyName = Literal["stability", "probe", "cascade", "margin", "learned"]
Mode = Literal["quality", "balanced", "speed"]
ExitKind = Literal["hard", "soft"]
KvFill = Literal["propagate", "defer"]
Drafter = Literal["auto", "early-exit", "prompt-lookup"]

# what each policy is configured by, with defaults where it has any; None must be given
POLICY_FIELDS: dict[str, dict[str, Any]] = {
    "stability": {"tau": 0.98, "consecutive_k": 2, "min_layer_ratio": 0.2},
    "probe": {"thresholds": None},
    "cascade": {
        "thresholds": None,
        "decay": 0.9,
        "weights": None,
        "targets": None,
        "exit_kind": "hard",
    },
    "margin": {"thresholds": None},
    "learned": {"thresholds": None},
}
_ALL_FIELDS = {name for fields in POLICY_FIELDS.values() for name in fields}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Generation(_Strict):
    """How fast the setting generated when it was calibrated, greedily, and how much like the model.

    Speeds are full depth's decoding time over the way's, after the same prompts: of the setting as
    written, with `drafter` or None; without a drafter; and of lossless mode with that drafter which
    is fastest there. agreement: share of the `tokens` generated under the setting that full depth
    would have chosen after the same text.
    """

    drafter: Drafter | None = None
    speedup: float = Field(gt=0.0)
    speedup_without_drafter: float = Field(gt=0.0)
    lossless_speedup: float = Field(gt=0.0)
    agreement: float = Field(ge=0.0, le=1.0)
    tokens: int = Field(ge=1)


class Certificate(_Strict):
    """What calibrate certified: with `confidence`, the risk is at most `risk_bound`.

    Risk is the share of tokens whose exit token differs from full depth's. speedup is wall-clock
    against full depth along given texts, layer_ratio the model's layers over the mean number of
    layers run. generation: None for certificates of before it was measured.
    """

    max_risk: float = Field(gt=0.0, lt=1.0)
    confidence: float = Field(gt=0.0, lt=1.0)
    risk_bound: float = Field(ge=0.0, le=1.0)
    observed_risk: float = Field(ge=0.0, le=1.0)
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)
    data_sha256: str
    policy: PolicyName
    speedup: float = Field(gt=0.0)
    layer_ratio: float = Field(gt=0.0)
    mode: Mode
    generation: Generation | None = None


class ExitConfig(_Strict):
    """When tokens exit, and what skipped layers' caches get. None stands for absent.

    thresholds, weights and targets are by depth, the layers run. engines/README.md describes each
    field; those of other policies than `policy` are refused.
    """

    policy: PolicyName = "stability"
    tau: float | None = Field(None, ge=0.0)
    consecutive_k: int | None = Field(None, ge=1)
    min_layer_ratio: float | None = Field(None, ge=0.0, le=1.0)
    thresholds: dict[int, float] | None = None
    decay: float | None = Field(None, ge=0.0, le=1.0)
    weights: dict[int, float] | None = None
    targets: dict[int, float] | None = None
    exit_kind: ExitKind | None = None
    kv_fill: KvFill = "propagate"
    drafter: Drafter | None = None
    certificate: Certificate | None = None

    @model_validator(mode="before")
    @classmethod
    def _holds_no_null(cls, data: Any) -> Any:
        """None is how this class says absent; a file leaves the field out."""
        for name, value in data.items() if isinstance(data, dict) else ():
            if value is None:
                raise ValueError(f"{name} is null; leave it out for its default")
        return data

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        own = POLICY_FIELDS[self.policy]
        for name in _ALL_FIELDS:
            if getattr(self, name) is None and name in own:
                if own[name] is None:
                    raise ValueError(f"{name} is missing, which policy {self.policy} needs")
                setattr(self, name, own[name])
            elif getattr(self, name) is not None and name not in own:
                raise ValueError(f"{name} does not belong to policy {self.policy}")
        self._check_depths()
        if self.drafter and (self.kv_fill == "propagate" or self.exit_kind == "soft"):
            raise ValueError(f"drafter {self.drafter} needs kv_fill defer and hard exits")
        return self

    def _check_depths(self) -> None:
        for name in ("thresholds", "weights", "targets"):
            values: dict[int, float] | None = getattr(self, name)
            if values is None:
                continue
            if not values or min(values) < 1:
                raise ValueError(f"{name} needs depths of 1 or more")
            largest = 1.0 if self.policy in ("margin", "learned") else float("inf")
            for depth, value in values.items():
                if not 0.0 <= value <= largest:
                    raise ValueError(f"{name}.{depth} {value} is out of range: 0 to {largest:g}")
            if values.keys() != (self.thresholds or {}).keys():
                raise ValueError(f"{name} has other depths than thresholds")
        if self.policy in ("probe", "cascade") and 0.0 in (self.thresholds or {}).values():
            raise ValueError("thresholds of risks must be above 0")

    @classmethod
    def for_layers(cls, layers: int) -> "ExitConfig":
        """The defaults for a model of `layers` layers, which may have fewer than K."""
        default = cls()
        assert default.consecutive_k is not None
        return default.model_copy(update={"consecutive_k": min(default.consecutive_k, layers)})

    def to_json(self) -> str:
        """The file's text; fields of other policies are absent."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"

    def settings(self) -> dict[str, Any]:
        """The policy's own fields."""
        return {name: getattr(self, name) for name in POLICY_FIELDS[self.policy]}

    def check_bundle(self, manifest: Manifest) -> None:
        """Raise SedacError when a depth is none at which tokens of that bundle may exit."""
        allowed = [depth for depth in manifest.exit_layers if depth < manifest.model.num_layers]
        for depth in self.thresholds or ():
            if depth not in allowed:
                listed = ", ".join(map(str, allowed))
                raise SedacError(
                    f"{EXIT_CONFIG}: thresholds.{depth}: tokens exit after {listed} layers only;"
                    " correct or delete it"
                )


def read_exit_config(directory: Path) -> ExitConfig:
    """The exit configuration of the bundle in `directory`; the defaults when it has none.

    Raises SedacError naming the field that is unknown or out of range.
    """
    path = directory / EXIT_CONFIG
    text = _core.read_unlisted(directory, EXIT_CONFIG)
    if text is None:
        return ExitConfig()
    try:
        return ExitConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or EXIT_CONFIG
        raise SedacError(f"{path}: {field}: {first['msg']}; correct or delete it") from error

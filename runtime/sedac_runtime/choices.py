"""The names that settings and outputs take; `_core.SPELLINGS` has those that the core knows."""

from typing import Literal

from sedac_runtime.flavour import Target

PolicyName = Literal["stability", "probe", "cascade", "margin", "learned"]
ExitKind = Literal["hard", "soft"]
KvFill = Literal["propagate", "defer"]
Mode = Literal["full", "exit", "lossless"]
LosslessDrafter = Literal["auto", "early-exit", "prompt-lookup", "trained"]
Drafter = Literal["none"] | LosslessDrafter
Verify = Literal["always", "changed"]
Backend = Literal["onnxruntime", "cuda"] | Target
BackendChoice = Literal["auto"] | Backend
# where a backend runs
DeviceChoice = Literal["cpu", "cuda"]
ExitReason = Literal[
    "full_depth",
    "depth_limit",
    "draft",
    "stability",
    "probe",
    "cascade",
    "margin",
    "learned",
]
FinishReason = Literal["stop", "length"]
CalibrationMode = Literal["quality", "balanced", "speed"]

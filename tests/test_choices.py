"""Names that Python repeats for types and options are all of the core's, and no others."""

from enum import StrEnum
from typing import Any, get_args

import pytest

from sedac_export.bundle import exit_config
from sedac_export.cli import commands, exit_commands, targets
from sedac_runtime import _core, choices, cli, flavour

NO_DRAFTER = {"none"}


def names(choice: Any) -> set[str]:
    if isinstance(choice, type) and issubclass(choice, StrEnum):
        return {value.value for value in choice}
    return {name for part in get_args(choice) for name in (get_args(part) or [part])}


@pytest.mark.parametrize(
    ("setting", "choice"),
    [
        ("policy", choices.PolicyName),
        ("policy", cli.Policy),
        ("exit_kind", choices.ExitKind),
        ("exit_reason", choices.ExitReason),
        ("kv_fill", choices.KvFill),
        ("kv_fill", cli.KvFill),
        ("kv_fill", exit_commands.KvFillName),
        ("drafter", choices.LosslessDrafter),
        ("drafter", cli.LosslessDrafter),
        ("mode", choices.Mode),
        ("mode", cli.GenerationMode),
        ("finish_reason", choices.FinishReason),
        ("verify", choices.Verify),
        ("verify", cli.Verify),
        ("verify", commands.VerifyName),
        ("target", flavour.Target),
        ("device", flavour.Device),
        ("backend", choices.Backend),
        ("calibration_mode", choices.CalibrationMode),
        ("calibration_mode", exit_commands.ModeName),
    ],
)
def test_names_are_the_cores(setting: str, choice: Any) -> None:
    assert names(choice) == set(_core.SPELLINGS[setting])


def test_there_is_a_target_for_every_backend() -> None:
    on_a_gpu = "onnxruntime-cuda"  # the backend onnxruntime on another device
    assert names(targets.TargetName) == {*_core.SPELLINGS["backend"], on_a_gpu}


def test_drafters_may_also_be_none() -> None:
    known = set(_core.SPELLINGS["drafter"]) | NO_DRAFTER
    assert names(choices.Drafter) == names(cli.Drafter) == known


def test_backends_may_also_be_chosen() -> None:
    known = set(_core.SPELLINGS["backend"]) | {"auto"}
    assert names(choices.BackendChoice) == names(cli.BackendName) == known


def test_every_policy_has_its_fields_in_the_file() -> None:
    assert set(exit_config.POLICY_FIELDS) == set(_core.SPELLINGS["policy"])
    (decoding,) = _core.SPELLINGS["decoding"]
    assert names(exit_config.Setting.model_fields["decoding"].annotation) == {decoding}

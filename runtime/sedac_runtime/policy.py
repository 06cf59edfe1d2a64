"""Which policy decides about exits: the bundle's, or what the caller sets instead."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from sedac_runtime._core import InputError

PolicyName = Literal["stability", "probe", "cascade", "margin", "learned"]


def choose_policy(
    bundle: Mapping[str, Any],
    name: PolicyName | None,
    threshold: float | None,
    stability: Mapping[str, float | None],
    depths: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """The settings of the policy `name`, as sedac_config.json has them.

    bundle: the bundle's own settings; they hold as far as they are about the same policy. threshold
    is for all depths, `depths` those that the bundle was trained for, by policy. stability holds
    tau, consecutive_k and min_layer_ratio, None where not set.

    Raises InputError when a setting belongs to another policy or is missing.
    """
    if name is not None and name not in get_args(PolicyName):
        choices = " or ".join(get_args(PolicyName))
        raise InputError(f"policy {name} is out of range: {choices}")
    given = {field: value for field, value in stability.items() if value is not None}
    chosen = name or ("stability" if given and threshold is None else bundle["policy"])
    settings = dict(bundle) if bundle["policy"] == chosen else {"policy": chosen}
    if chosen == "stability":
        if threshold is not None:
            raise InputError("threshold belongs to the other policies; set tau, or another policy")
        return settings | given
    if given:
        raise InputError(f"{next(iter(given))} belongs to policy stability, not to {chosen}")
    if threshold is not None:
        settings["thresholds"] = dict.fromkeys(map(str, depths[chosen]), threshold)
        if chosen == "cascade":
            for field in ("weights", "targets"):
                settings[field] = dict.fromkeys(settings["thresholds"], 1.0)
    if not settings.get("thresholds"):
        raise InputError(
            f"policy {chosen} has no thresholds in this bundle; run sedac-export train-probes and"
            " calibrate, and set a threshold if the bundle's policy is another"
        )
    return settings

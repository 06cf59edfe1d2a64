"""How far a bundle's engines may be from the model that they were built from."""

# what a build allows by default
DEFAULT_TOLERANCE = 1e-4


def tolerance_note(tolerance: float) -> str | None:
    """A note on a bundle whose build allowed `tolerance`; None for no more than the default.

    tolerance is the largest difference from the model in any engine's output, relative to the
    larger of 1 and the model's largest value.
    """
    if tolerance <= DEFAULT_TOLERANCE:
        return None
    return (
        f"built with --atol {tolerance:g}, above the default of {DEFAULT_TOLERANCE:g}: engines may"
        " differ from the model by as much, and so may tokens"
    )

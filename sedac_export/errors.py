"""The one exception a user's mistake turns into; the command line prints it as one line."""


class SedacError(Exception):
    """Bad input or a model that cannot be exported: names the thing, the reason and the remedy."""

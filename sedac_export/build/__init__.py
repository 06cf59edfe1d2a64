"""Build a bundle from a model, and validate it against the original."""

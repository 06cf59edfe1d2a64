"""Run a bundle over texts with exits, many tokens in one pass."""

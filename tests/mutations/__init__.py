"""Mutated bundles: each is refused or gives the right tokens, and nothing outside is opened."""

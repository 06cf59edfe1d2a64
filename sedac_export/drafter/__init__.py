"""A drafter that is trained for a model whose own weights stay as they are."""

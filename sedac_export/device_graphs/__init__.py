"""Graphs that devices run in the bundle's own precision, over the weights that it holds."""

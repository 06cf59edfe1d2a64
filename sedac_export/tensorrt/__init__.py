"""TensorRT and TensorRT-RTX: portable graphs, plans built from them, and their validation."""

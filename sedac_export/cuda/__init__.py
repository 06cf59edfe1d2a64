"""The target cuda: the whole chain as one kernel, compiled for a model's shape."""

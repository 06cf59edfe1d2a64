"""A model's ONNX graphs: its parts as modules, traced, with weights bound."""

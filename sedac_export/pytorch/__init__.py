"""Early exit inside a Hugging Face model in PyTorch."""

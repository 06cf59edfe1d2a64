"""The Hugging Face model that is exported: all that knows transformers."""

"""An OpenAI-compatible HTTP server for bundles, the extra sedac-runtime[serve]."""

"""Which mode to run a bundle in: measured on the user's text and machine."""

"""Early exits: replayed over texts, trained, calibrated."""

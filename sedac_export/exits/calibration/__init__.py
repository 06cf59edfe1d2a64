"""Choose a bundle's exit setting, certify it and report on it."""

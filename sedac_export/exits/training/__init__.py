"""Train the probes, lenses and heads of a bundle's exits."""

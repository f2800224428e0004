"""One training, from an empty run folder to its table."""

"""Data sets that are computed, to try everything without a download."""

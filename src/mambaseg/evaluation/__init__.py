"""Scores and costs: pure functions, and their collection over cases."""

"""Figures and tables made from what runs have stored."""

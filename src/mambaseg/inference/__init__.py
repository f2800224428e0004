"""Trained networks on anybody's images."""

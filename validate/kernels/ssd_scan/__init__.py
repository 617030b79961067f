"""Mamba-2's scan in chunks (state-space duality), forward."""

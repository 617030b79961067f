"""Attention over whole sequences: forward, backward, packed lengths, windows."""

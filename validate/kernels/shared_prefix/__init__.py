"""Attention of one new token of many sequences that share the beginning of their cache."""

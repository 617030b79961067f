"""Attention of one new token over its cache: contiguous, paged, quantised."""

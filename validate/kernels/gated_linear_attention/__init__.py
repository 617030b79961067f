"""Chunked gated linear attention: no decay, one a head, or one a key channel."""

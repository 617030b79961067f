"""One module per command; each imports what it computes with only when it runs."""

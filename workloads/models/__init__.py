"""Model architectures: read from a config, counted, unrolled into ops."""

"""Short causal convolutions of each channel by itself."""

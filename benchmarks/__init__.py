"""Speeds of our own code, as ratios against a baseline in the same run: python -m benchmarks."""

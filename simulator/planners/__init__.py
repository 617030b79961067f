"""Optimisation problems over plans, one formulation a file."""

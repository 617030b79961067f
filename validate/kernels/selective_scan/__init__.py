"""Mamba's selective scan (S6), forward."""

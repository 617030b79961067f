"""The command line: parse, call, draw, print."""

__version__ = "0.1.0"

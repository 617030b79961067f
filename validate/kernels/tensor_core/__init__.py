"""The rate of the matrix units themselves, with nothing to wait for."""

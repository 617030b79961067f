"""Static analysis of kernels: compiled ahead of time for a GPU that need not be present."""

"""Kernels that reduce rows: softmax, RMS norm, layer norm, with gradients of the first two."""

"""The truth of a linear layer's product, in float64."""

from __future__ import annotations

import torch


def product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """C[m, n] = A[m, k] W[n, k]^T: each row of A against each row of the weight."""
    return a.double() @ w.double().mT

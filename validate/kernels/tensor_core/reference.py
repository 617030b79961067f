"""The truth of a chain of equal products, in float64."""

from __future__ import annotations

import torch


def chain(a: torch.Tensor, b: torch.Tensor, iterations: int) -> torch.Tensor:
    """C[p, m, n] = iterations A[p, m, k] B[p, n, k]^T: the same product again and again."""
    return iterations * (a.double() @ b.double().mT)

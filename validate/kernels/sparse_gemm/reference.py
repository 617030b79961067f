"""Pruning to 2:4, and the truth of a product with the pruned weight in float64."""

from __future__ import annotations

import torch


def pruned(w: torch.Tensor) -> torch.Tensor:
    """W with the two smallest of every four neighbours along k set to zero.

    Of equal magnitudes the first stay, so exactly two of four are kept (Mishra et al. 2021,
    arXiv 2104.08378, section 3).
    """
    rows, k = w.shape
    groups = w.reshape(rows, k // 4, 4)
    order = groups.float().abs().sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return torch.where(kept, groups, torch.zeros_like(groups)).reshape(rows, k)


def product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """C[m, n] = A[m, k] W[n, k]^T."""
    return a.double() @ w.double().mT

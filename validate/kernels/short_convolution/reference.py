"""The truth of short convolutions, tap by tap in float64, and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def short_convolution(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, *, activation: bool
) -> torch.Tensor:
    """y[b, t, c] = act(bias[c] + sum_k w[c, k] x[b, t + k - (width - 1), c])."""
    width, length = w.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = sum(w[:, k] * padded[:, k : k + length] for k in range(width))
    assert isinstance(y, torch.Tensor)
    if bias is not None:
        y = y + bias
    return F.silu(y) if activation else y


def gradients(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    dy: torch.Tensor,
    *,
    activation: bool,
) -> tuple[torch.Tensor, ...]:
    """dx, dw and, given a bias, its gradient."""
    leaves = [v.detach().requires_grad_() for v in (x, w, bias) if v is not None]
    given = (*leaves, None)[:3]
    y = short_convolution(given[0], given[1], given[2], activation=activation)
    return torch.autograd.grad(y, leaves, dy)

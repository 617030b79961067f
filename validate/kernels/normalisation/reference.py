"""The truth of the row reductions, in float64."""

from __future__ import annotations

import torch

EPSILON = 1e-5


def softmax(x: torch.Tensor) -> torch.Tensor:
    """exp(x - max) / sum exp(x - max) over the last axis."""
    x = x.double()
    e = torch.exp(x - x.amax(dim=-1, keepdim=True))
    return e / e.sum(dim=-1, keepdim=True)


def softmax_backward(y: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """dx = y (dy - sum(y dy)) of the softmax y."""
    y, dy = y.double(), dy.double()
    return y * (dy - (y * dy).sum(dim=-1, keepdim=True))


def rstd(x: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + epsilon) of every row."""
    return (x.double().square().mean(dim=-1) + EPSILON).rsqrt()


def rmsnorm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x rstd w (Zhang and Sennrich 2019)."""
    return x.double() * rstd(x)[:, None] * w.double()


def rmsnorm_backward(
    x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = r (w dy - n mean(w dy n)) with n = x r, and dw = sum over rows of dy n."""
    n, dy = x.double() * r.double()[:, None], dy.double()
    g = dy * w.double()
    dx = r.double()[:, None] * (g - n * (g * n).mean(dim=-1, keepdim=True))
    return dx, (dy * n).sum(dim=0)


def layernorm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(x - mean) / sqrt(var + epsilon) w + b (Ba et al. 2016)."""
    x = x.double()
    off = x - x.mean(dim=-1, keepdim=True)
    return off * (off.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt() * w + b

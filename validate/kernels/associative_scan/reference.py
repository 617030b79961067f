"""The recurrence element after element in float64, and its gradients by autograd."""

from __future__ import annotations

import torch


def scan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """h[rows, t] = a[rows, t] h[rows, t - 1] + b[rows, t], from h = 0."""
    state = torch.zeros_like(b[:, 0])
    steps = []
    for t in range(b.shape[1]):
        state = a[:, t] * state + b[:, t]
        steps.append(state)
    return torch.stack(steps, dim=1)


def gradients(a: torch.Tensor, b: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """da and db where h has the gradient dh: autograd of `scan`."""
    leaves = [x.detach().clone().requires_grad_() for x in (a, b)]
    return torch.autograd.grad(scan(*leaves), leaves, dh)

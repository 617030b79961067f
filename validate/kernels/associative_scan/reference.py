"""The recurrence in float64: element after element, long rows by doubling; and its gradients."""

from __future__ import annotations

from typing import Final

import torch

MOST_STEPS: Final = 1024
"""Longest row that is taken step after step: a GPU needs two launches for every step."""


def scan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """h[rows, t] = a[rows, t] h[rows, t - 1] + b[rows, t], from h = 0."""
    return (by_steps if b.shape[1] <= MOST_STEPS else by_doubling)(a, b)


def by_steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The recurrence as it is written."""
    state = torch.zeros_like(b[:, 0])
    steps = []
    for t in range(b.shape[1]):
        state = a[:, t] * state + b[:, t]
        steps.append(state)
    return torch.stack(steps, dim=1)


def by_doubling(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same in log2(len) passes: h over the last s elements becomes h over 2 s."""
    product, h, span = a.clone(), b.clone(), 1
    while span < b.shape[1]:
        h[:, span:] += product[:, span:] * h[:, :-span]
        product[:, span:] = product[:, span:] * product[:, :-span]
        span *= 2
    return h


def gradients(a: torch.Tensor, b: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """da and db where h has the gradient dh: autograd of `scan`, long rows in closed form."""
    if b.shape[1] > MOST_STEPS:
        return in_closed_form(a, b, dh)
    leaves = [x.detach().clone().requires_grad_() for x in (a, b)]
    return torch.autograd.grad(by_steps(*leaves), leaves, dh)


def in_closed_form(a: torch.Tensor, b: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """e[t] = dh[t] + a[t + 1] e[t + 1]: db = e, da[t] = e[t] h[t - 1]."""
    later = torch.zeros_like(a)
    later[:, :-1] = a[:, 1:]
    e = scan(later.flip(1), dh.flip(1)).flip(1)
    da = torch.zeros_like(e)
    da[:, 1:] = e[:, 1:] * scan(a, b)[:, :-1]
    return da, e

"""Mamba-2's recurrence step after step in float64."""

from __future__ import annotations

import torch
from torch.nn.functional import softplus


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y[batch, len, heads, head_dim] and the last state[batch, heads, states, head_dim].

    x is shaped as y; dt [batch, len, heads]; b, c [batch, len, groups, states]; a, bias, d [heads].
    """
    share = x.shape[2] // b.shape[2]
    b, c = (part.repeat_interleave(share, dim=2) for part in (b, c))
    step = softplus(dt + bias, threshold=10**6)
    state = x.new_zeros(x.shape[0], x.shape[2], b.shape[3], x.shape[3])
    outs = []
    for t in range(x.shape[1]):
        decay = torch.exp(a * step[:, t])[..., None, None]
        u = step[:, t, :, None] * x[:, t]
        state = decay * state + b[:, t, :, :, None] * u[:, :, None, :]
        outs.append((state * c[:, t, :, :, None]).sum(2) + d[:, None] * x[:, t])
    return torch.stack(outs, dim=1), state

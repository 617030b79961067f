"""The selective scan step after step in float64."""

from __future__ import annotations

import torch
from torch.nn.functional import silu, softplus


def selective_scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    z: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y[batch, len, channels] and the last state[batch, channels, states].

    x, delta, z are [batch, len, channels]; b, c [batch, len, states]; a [channels, states].
    """
    step = softplus(delta + bias, threshold=10**6)
    state = x.new_zeros(x.shape[0], *a.shape)
    outs = []
    for t in range(x.shape[1]):
        scale = step[:, t, :, None]
        state = torch.exp(scale * a) * state + scale * b[:, t, None, :] * x[:, t, :, None]
        outs.append((state * c[:, t, None, :]).sum(-1) + d * x[:, t])
    return torch.stack(outs, dim=1) * silu(z), state

"""The delta rule step after step in float64."""

from __future__ import annotations

import torch


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """o[batch, len, heads, value_dim] and the last state[batch, heads, key_dim, value_dim].

    q, k are [batch, len, key_heads, key_dim]; beta and g (log decays) [batch, len, heads].
    """
    share = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(share, dim=2) for x in (q, k))
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t, :, None, None].exp()
        held = (k[:, t, :, :, None] * state).sum(-2)
        change = beta[:, t, :, None] * (v[:, t] - held)
        state = state + k[:, t, :, :, None] * change[:, :, None, :]
        outs.append((q[:, t, :, :, None] * state).sum(-2))
    return torch.stack(outs, dim=1), state

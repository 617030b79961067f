"""The recurrence step after step in float64, and its gradients by autograd."""

from __future__ import annotations

import torch


def gated_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None
) -> torch.Tensor:
    """o[batch, len, heads, value_dim]: S = e^g S + k v^T, o = S^T q.

    q, k are [batch, len, heads, key_dim]; g the log decays, [batch, len, heads] or of q's shape.
    """
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outs = []
    for t in range(q.shape[1]):
        if g is not None:
            decay = g[:, t].exp()
            state = state * (decay[..., None, None] if g.dim() == 3 else decay[..., None])
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((q[:, t, :, :, None] * state).sum(-2))
    return torch.stack(outs, dim=1)


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, do: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and (given g) dg: autograd of the recurrence."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    decay = None if g is None else g.detach().clone().requires_grad_()
    out = gated_linear_attention(leaves[0], leaves[1], leaves[2], decay)
    return torch.autograd.grad(out, leaves if decay is None else [*leaves, decay], do)

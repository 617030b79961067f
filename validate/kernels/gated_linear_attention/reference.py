"""The recurrence step after step in float64, and its gradients by autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch.utils.checkpoint import checkpoint

MOST_KEPT: Final = 256
"""Longest sequence whose every state autograd keeps; others are run again in stretches."""
Steps = Sequence[torch.Tensor]


def gated_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None
) -> torch.Tensor:
    """o[batch, len, heads, value_dim]: S = e^g S + k v^T, o = S^T q.

    q, k are [batch, len, heads, key_dim]; g the log decays, [batch, len, heads] or of q's shape.
    """
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    return torch.stack(_stretch(state, *_steps(q, k, v, g))[1:], dim=1)


def _steps(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None
) -> tuple[Steps, Steps, Steps, Steps | None]:
    """Each tensor by steps, all at once: a gradient a step would be as large as the tensor."""
    decays = None
    if g is not None:
        decays = (g[..., None, None] if g.dim() == 3 else g[..., None]).exp().unbind(1)
    return q.unbind(1), k.unbind(1), v.unbind(1), decays


def _stretch(
    state: torch.Tensor, q: Steps, k: Steps, v: Steps, decays: Steps | None
) -> tuple[torch.Tensor, ...]:
    """The state after some steps, and their outputs."""
    outs = []
    for t in range(len(q)):
        if decays is not None:
            state = state * decays[t]
        state = state + k[t][..., :, None] * v[t][..., None, :]
        outs.append((q[t][..., :, None] * state).sum(-2))
    return (state, *outs)


def in_stretches(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None
) -> torch.Tensor:
    """The same output; autograd keeps a state every sqrt(len) steps and runs the rest again."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    qs, ks, vs, decays = _steps(q, k, v, g)
    size = math.isqrt(q.shape[1])
    outs: list[torch.Tensor] = []
    for at in range(0, len(qs), size):
        part = slice(at, at + size)
        own = None if decays is None else decays[part]
        found = checkpoint(
            _stretch, state, qs[part], ks[part], vs[part], own,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        state = found[0]
        outs += found[1:]
    return torch.stack(outs, dim=1)


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, do: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and (given g) dg: autograd of the recurrence."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    decay = None if g is None else g.detach().clone().requires_grad_()
    run = gated_linear_attention if q.shape[1] <= MOST_KEPT else in_stretches
    out = run(leaves[0], leaves[1], leaves[2], decay)
    return torch.autograd.grad(out, leaves if decay is None else [*leaves, decay], do)

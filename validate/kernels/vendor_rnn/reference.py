"""The truth of recurrent layers as libraries run them: step by step in float64.

lstm   i, f, z, o = W x + U h + b;  c = s(f) c + s(i) tanh(z);  h = s(o) tanh(c)
gru    q, z = s(W x + U h + b);  n = tanh(W_n x + b_n + q (U_n h + b'_n));  h = (1 - z) n + z h
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def hidden_states(cell: str, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """h[T, B, H] of x[T, B, I] from states of zeros; weights W, U and both biases."""
    w, u, b_in, b_state = weights
    h = x.new_zeros(x.shape[1], u.shape[1])
    c, found = h, []
    for now in x:
        given, fed = now @ w.T + b_in, h @ u.T + b_state
        if cell == "lstm":
            i, f, z, o = (given + fed).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * z.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (q, z, n), (q2, z2, n2) = given.chunk(3, dim=1), fed.chunk(3, dim=1)
            z = (z + z2).sigmoid()
            h = z * h + (1 - z) * (n + (q + q2).sigmoid() * n2).tanh()
        found.append(h)
    return torch.stack(found)


def gradients(
    cell: str, x: torch.Tensor, weights: Sequence[torch.Tensor], dh: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of x and of all weights."""
    leaves = [v.detach().requires_grad_() for v in (x, *weights)]
    return torch.autograd.grad(hidden_states(cell, leaves[0], leaves[1:]), leaves, dh)

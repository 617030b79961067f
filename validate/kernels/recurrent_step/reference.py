"""The truth of recurrent layers: one step after the other in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def lstm_cell(z: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """(y, c) from pre-activations z[4, ...] of gates i, f, z, o."""
    i, f, new, o = z.sigmoid()[0], z.sigmoid()[1], z[2].tanh(), z[3].sigmoid()
    c = f * states[1] + i * new
    return [o * c.tanh(), c]


def slstm_cell(z: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """(y, c, n, m), the exponential gates held back by m."""
    _, c, n, m = states
    kept = F.logsigmoid(z[1]) + m
    m = torch.maximum(z[0], kept)
    i, f = (z[0] - m).exp(), (kept - m).exp()
    c = f * c + i * z[2].tanh()
    n = (f * n + i).clamp(min=1)
    return [z[3].sigmoid() * c / n, c, n, m]


Cell = Callable[[torch.Tensor, list[torch.Tensor]], list[torch.Tensor]]
CELLS: dict[str, Cell] = {"lstm": lstm_cell, "slstm": slstm_cell}


def recurrence(
    cell: str, x: torch.Tensor, r: torch.Tensor, b: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """states[S, T, B, H, d] of x[T, B, 4, H, d], r[H, 4, d, d] (from, to), b[4, H, d] and
    first[S, B, H, d]."""
    x, r, b = x.double(), r.double(), b.double()
    states, found = list(first.double()), []
    for now in x:
        z = now.transpose(0, 1) + torch.einsum("bhj,hgji->gbhi", states[0], r) + b[:, None]
        states = CELLS[cell](z, states)
        found.append(torch.stack(states))
    return torch.stack(found, dim=1)

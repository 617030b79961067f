"""Attention and its gradients in float64, one head of one sequence after another.

    S = scale Q K^T, hidden pairs out    lse = log(sum_j exp(S_j) + exp(sink))
    P = exp(S - lse)    O = P V
    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(dO * O))    dQ = scale dS K
    dK = scale dS^T Q    dsink = -sum_rows exp(sink - lse) rowsum(dO * O)

A query that sees no key gives O = 0 and lse = -infinity. Rows are taken `ROWS` at a time, which
bounds the memory and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch

ROWS: Final = 1024


class Mask(NamedTuple):
    """Which keys a query sees; positions count over the keys, the last query at the last key.

    `causal`: none after its own position. `window`: of those the last so many, its own among
    them (0: all). `sinks`: the first so many keys besides, window or not.
    """

    causal: bool = False
    window: int = 0
    sinks: int = 0

    def seen(self, rows: torch.Tensor, len_q: int, len_kv: int) -> torch.Tensor:
        """[rows, len_kv]: whether query `rows` sees the key."""
        place = (rows + len_kv - len_q)[:, None]
        keys = torch.arange(len_kv, device=rows.device)[None, :]
        seen = keys <= place if self.causal else torch.ones_like(keys <= place)
        if self.window:
            seen = seen & ((keys > place - self.window) | (keys < self.sinks))
        return seen


class Head(NamedTuple):
    """One head of one sequence in float64; `sink` is a learned logit or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sink: torch.Tensor | None = None

    def probabilities(
        self, mask: Mask, rows: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P[rows, len_kv] and lse[rows]."""
        scores = self.q[rows] @ self.k.T * scale
        scores = scores.masked_fill(~mask.seen(rows, len(self.q), len(self.k)), -torch.inf)
        if self.sink is not None:
            scores = torch.cat([scores, self.sink.expand(len(rows), 1)], dim=1)
        lse = torch.logsumexp(scores, dim=1)
        p = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[:, None])
        return p[:, : len(self.k)], lse

    def attend(self, mask: Mask, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """O[len_q, head_dim] and lse[len_q]."""
        parts = [self.probabilities(mask, rows, scale) for rows in _row_blocks(self.q)]
        return torch.cat([p @ self.v for p, _ in parts]), torch.cat([lse for _, lse in parts])


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    scale: float,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and lse of q[batch, heads, len_q, d] over k, v[batch, kv_heads, len_kv, d], float64."""
    o = torch.empty_like(q, dtype=torch.float64)
    lse = torch.empty(q.shape[:3], dtype=torch.float64, device=q.device)
    for b, h, head in _heads(q, k, v, sink):
        o[b, h], lse[b, h] = head.attend(mask, scale)
    return o, lse


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    mask: Mask,
    scale: float,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """dQ, dK, dV and, with sinks, dsink[heads], in float64."""
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v))
    dsink = torch.zeros(q.shape[1], dtype=torch.float64, device=q.device)
    group = q.shape[1] // k.shape[1]
    for b, h, head in _heads(q, k, v, sink):
        for rows in _row_blocks(head.q):
            p, lse = head.probabilities(mask, rows, scale)
            dout = do[b, h, rows].double()
            delta = (dout * (p @ head.v)).sum(dim=1)
            ds = p * (dout @ head.v.T - delta[:, None]) * scale
            dq[b, h, rows] = ds @ head.k
            dk[b, h // group] += ds.T @ head.q[rows]
            dv[b, h // group] += p.T @ dout
            if head.sink is not None:
                dsink[h] -= (torch.exp(head.sink - lse) * delta).sum()
    return (dq, dk, dv) if sink is None else (dq, dk, dv, dsink)


def _heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None
) -> Iterator[tuple[int, int, Head]]:
    """Sequence, query head, and what they hold."""
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            of_head = None if sink is None else sink[h].double()
            keys, values = (x[b, h // group].double() for x in (k, v))
            yield b, h, Head(q[b, h].double(), keys, values, of_head)


def _row_blocks(q: torch.Tensor) -> Iterator[torch.Tensor]:
    for first in range(0, len(q), ROWS):
        yield torch.arange(first, min(first + ROWS, len(q)), device=q.device)

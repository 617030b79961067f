"""One query a head over a cache, in float64, one sequence after another.

    o = softmax(scale q K^T) V,    K = scale_k * K_stored,    V = scale_v * V_stored

A quantised cache stores integers or fp8 numbers with a scale a token and head, or one for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x[..., head_dim] as int8 with an fp32 scale a row: the row's greatest magnitude is 127.

    >>> stored, scale = quantised(torch.tensor([[-2.0, 1.0]]))
    >>> stored.tolist(), round(float(scale[0]), 4)
    ([[-127, 64]], 0.0157)
    """
    scale = x.float().abs().amax(dim=-1).clamp(min=1e-6) / 127
    return torch.round(x.float() / scale[..., None]).to(torch.int8), scale


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """o[heads, d] and lse[heads] of q[heads, d] over k, v[kv_heads, len, d], float64."""
    group = q.shape[0] // k.shape[0]
    keys, values = (x.double().repeat_interleave(group, dim=0) for x in (k, v))
    scores = (keys @ q.double()[:, :, None])[..., 0] * scale
    lse = torch.logsumexp(scores, dim=1)
    p = torch.exp(scores - lse[:, None])
    return (p[:, None, :] @ values)[:, 0], lse


def decode(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o[batch, heads, d] and lse[batch, heads]; keys and values [kv_heads, len, d] a sequence."""
    found = [attend(q[b], k, v, scale) for b, (k, v) in enumerate(zip(keys, values, strict=True))]
    return torch.stack([o for o, _ in found]), torch.stack([lse for _, lse in found])


def gathered(pool: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """[kv_heads, len, ...] from pages pool[page, slot, kv_heads, ...] in a sequence's order."""
    used = -(-length // pool.shape[1])
    rows = pool[table[:used].long()].flatten(0, 1)[:length]
    return rows.transpose(0, 1)

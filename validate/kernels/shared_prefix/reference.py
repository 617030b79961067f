"""One query a head over a shared prefix and a sequence's own keys, as one softmax, in float64."""

from __future__ import annotations

import torch

from validate.kernels.decode_attention.reference import decode


def shared_prefix(
    q: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o[batch, heads, d] and lse of q[batch, heads, d].

    prefix: K, V[kv_heads, len_prefix, d]; own: K, V[batch, kv_heads, len_suffix, d].
    """
    keys, values = (
        [torch.cat([shared, mine[b]], dim=1) for b in range(len(q))]
        for shared, mine in zip(prefix, own, strict=True)
    )
    return decode(q, keys, values, scale)

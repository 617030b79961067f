"""Decoding where all sequences of a batch share the beginning of their keys (a system prompt).

Hydragen (Juravsky et al. 2024, arXiv 2402.05099, section 3): the softmax over [prefix; own keys]
is taken in parts,

    prefix   the queries of all sequences and of a group's heads are the rows of one matrix
             product with the prefix's keys, which are read once and not once a sequence
    suffix   each sequence over its own keys, as in `decode_attention`
    merge    o = sum_i exp(lse_i - lse) o_i,    lse = log sum_i exp(lse_i)

Both phases are `decode_parts`, with tall tiles of rows where the prefix is shared; each may be cut
into parts that fill the GPU, and all parts are merged at once: three launches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from validate.kernels.decode_attention.kernel import (
    Cache,
    launch_merge,
    launch_parts,
    outputs,
    part_outputs,
    parts_of,
)
from validate.kernels.spec import Launch


def plan_shared(
    q: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    own: Cache,
    launches: tuple[Launch, Launch],
    *,
    scale: float,
    dtype: str = "",
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that computes o (as q[batch, heads, d]) and lse[batch, heads].

    `prefix`: K and V[kv_heads, len, d]; `launches`: the tiles of the prefix and of the suffix.
    """
    batch = q.shape[0]
    shared = Cache(prefix[0][None], prefix[1][None], prefix[0].shape[1])
    first = parts_of(q, shared, launches[0], None, shared_by=batch)
    second = parts_of(q, own, launches[1], None)
    number = first.number + second.number
    held, out = part_outputs(q, number), outputs(q)
    of_prefix = launch_parts(
        q, shared, held, launches[0], scale=scale, parts=first, num_parts=number,
        shared_by=batch, dtype=dtype,
    )  # fmt: skip
    of_suffix = launch_parts(
        q, own, held, launches[1], scale=scale, parts=second, first_part=first.number,
        num_parts=number, dtype=dtype,
    )  # fmt: skip
    merge = launch_merge(held, out)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        of_prefix()
        of_suffix()
        merge()
        return out

    return run

"""Prefix linear attention (JRT-RNN): Based, after an encoder region that every token reads.

    o_i = phi(q_i) (sum_{j <= M} phi(k^e_j) v^e_j^T + sum_{j <= i} phi(k_j) v_j^T)
          / phi(q_i) . (sum_{j <= M} phi(k^e_j) + sum_{j <= i} phi(k_j))

The first M tokens have keys k^e and values v^e of projections of their own; their sums are the
state that the causal part begins with (Arora et al. 2024, arXiv 2407.05483, section 4, equation 2;
kernel: HazyResearch/ThunderKittens, examples/jrt/H100/prefill.cu, which works through the
encoder's chunks before the decoder's). Beside `Based`, per head and for M encoded tokens:

    products   2 M (d + F) u              update of the state alone: no scores, no outputs
    vector     P M F + (M + chunks) u
    bytes      P M d e + M dv e

JRT-Prompt repeats the prompt instead: `Based` over twice the length. After the prompt both decode
from a state as large as Based's (`step`, `state_bytes`). Ignored: storing the final state, padding
to the left of prompts shorter than M (masked keys are zero and cost what others do).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workloads.numeric import Num
from workloads.ops.based import Based


@dataclass(frozen=True, kw_only=True)
class PrefixLinearAttention(Based):
    """`Based` with K, V[batch, num_heads, len_encoder, ...] of an encoder region besides.

    `len_encoder` left out is half of `len_seq`, rounded up, as in the paper's benchmark.

    >>> op = PrefixLinearAttention(num_heads=1, len_seq=4096)
    >>> causal = Based(num_heads=1, len_seq=4096)
    >>> sum(op.min_flops().values()) / sum(causal.min_flops().values())
    1.25
    """

    name: ClassVar[str] = "prefix_linear_attention"
    len_encoder: Num | None = None

    @property
    def encoded(self) -> Num:
        """Tokens of the encoder region."""
        return (self.len_seq + 1) // 2 if self.len_encoder is None else self.len_encoder

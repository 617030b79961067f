"""What attentions with a structure share: streams of a head each, stages run in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Values
from workloads.numeric import Num, any_true
from workloads.op import Arrays, ProvedOp
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.selected_attention import SelectedAttention
from workloads.ops.staged import Step, SteppedOp


@dataclass(frozen=True, kw_only=True)
class StructuredAttention(SteppedOp):
    """Self-attention of x[batch, num_heads, len_seq, head_dim]; every head has K and V of its own.

    A stream is one head of one sequence.
    """

    batch: Num = 1
    num_heads: Num
    len_seq: Num
    head_dim: Num
    dtype: DType = BF16

    @property
    def streams(self) -> Num:
        """Heads of all sequences."""
        return self.batch * self.num_heads

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O once."""
        rows = self.streams * self.len_seq
        return 4 * rows * self.head_dim * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k and v."""
        return {name: self.random_rows(rng, self.len_seq) for name in ("q", "k", "v")}

    def random_rows(self, rng: np.random.Generator, rows: Num) -> Values:
        """[batch, num_heads, rows, head_dim]."""
        shape = (self.batch, self.num_heads, rows, self.head_dim)
        return rng.standard_normal([int(n) for n in shape])

    def pieces(
        self, count: Num, len_q: Num, len_kv: Num, *, causal: bool = False, group: Num = 1
    ) -> FlashAttention2:
        """Attention of `count` pieces of one K and V head each, which `group` query heads share."""
        return FlashAttention2(
            batch=count, num_heads=group, num_kv_heads=1, len_q=len_q, len_kv=len_kv,
            head_dim=self.head_dim, causal=causal, dtype=self.dtype,
        )  # fmt: skip

    def single(self, count: Num, len_kv: Num) -> SelectedAttention:
        """One query each over all `len_kv` keys of its piece: a list with a single run."""
        return SelectedAttention(
            batch=count, num_heads=1, len_kv=len_kv, head_dim=self.head_dim, len_selected=len_kv,
            block_k=len_kv, dtype=self.dtype,
        )  # fmt: skip

    def copy(self, rows: Num) -> Elementwise:
        """Rows brought to other places."""
        return Elementwise(
            num_elements=rows * self.head_dim, vector_flops_per_element=0, dtype=self.dtype
        )

    def must_divide(self, name: str, part: Num, whole: Num) -> None:
        """Refuse pieces that do not make up the sequence."""
        if any_true(whole % part != 0):
            raise InputError(
                f"{self.name}: {name} = {part} must divide len_seq = {whole}; pad the sequence"
            )


def attended(step: Step, op: ProvedOp, q: Values, k: Values, v: Values) -> tuple[Values, Values]:
    """O and logsumexp of q[pieces, (group,) rows, w] over k and v[pieces, keys, w].

    The shape of both results is that of q, the last axis of the logsumexp 1.
    """
    given = {"q": q if q.ndim == 4 else q[:, None], "k": k[:, None], "v": v[:, None]}
    if isinstance(op, SelectedAttention):
        given["index"] = np.zeros((int(op.num_lists), 1))
    found = step(op, given)
    return found["o"].reshape(q.shape), found["lse"].reshape(*q.shape[:-1], 1)


def moved(step: Step, op: Elementwise, x: Values) -> Values:
    """A copy's program on an array of any shape."""
    return step(op, {"x0": np.ascontiguousarray(x).reshape(-1)})["y0"].reshape(x.shape)

"""Attention under a lambda-shaped mask: the first keys of the sequence and a window of the last.

Position p (counted over all keys) sees the keys j <= p with j < num_sinks or j > p - window:

    seen(p) = min(p + 1, num_sinks + window),    flops 2 (d + dv) sum over p of seen(p)

StreamingLLM (Xiao et al. 2023, arXiv 2309.17453, section 3.2) keeps 4 sinks and a window of the
cache's rest; LM-Infinite (Han et al. 2023, arXiv 2308.16137, section 4) keeps 10 to 100 first keys
and the length it was trained on. Both renumber positions inside the cache, which changes no count.

The program is FlashAttention-2's with other key blocks: a block of queries visits the sinks that
lie before its window, then the window, whose blocks start at the first key that its first query
sees and are all masked (as flash_attn does for local attention) unless the tile holds a single
position. Ignored: evicting what leaves the window, and rotating cached keys to their new places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.errors import InputError
from workloads.machine import Values, slices
from workloads.numeric import Num, any_true, ceil_div, maximum, minimum, where
from workloads.op import Arrays, Stage
from workloads.ops.attention import AttentionOp, Sizes, gradients
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.flash_attention import FlashAttention2, QuerySums, ceil_sum
from workloads.ops.prefill_attention import PrefillAttention


@dataclass(frozen=True, kw_only=True)
class WindowedAttention(FlashAttention2):
    """`num_sinks` first keys (none by default) and the last `window` keys of each query, causal.

    A query's own key counts as one of its window. One new token is len_q = 1 with len_kv the
    length of the stream, of which the cache keeps min(len_kv, num_sinks + window) keys.

    >>> op = WindowedAttention(num_heads=32, len_q=8192, head_dim=128, num_sinks=4, window=1020)
    >>> op.num_pairs() == 1024 * 1025 // 2 + (8192 - 1024) * 1024
    True
    >>> op.over(len_q=1, len_kv=8192).cache_bytes() == 2 * 2 * 32 * 128 * 1024
    True
    """

    name: ClassVar[str] = "windowed_attention"
    window: Num
    num_sinks: Num | None = None
    causal: bool = True

    def check(self) -> None:
        """A causal mask, and a window that leaves something out."""
        super().check()
        if not self.causal:
            raise InputError(f"{self.name}: a window of last keys needs causal=true")
        if any_true(self.window > self.len_keys):
            raise InputError(
                f"{self.name}: window = {self.window} is longer than the len_kv = "
                f"{self.len_keys} keys there are; shorten it, or take flash_attention_2"
            )

    @property
    def sinks(self) -> Num:
        """`num_sinks`, else none."""
        return 0 if self.num_sinks is None else self.num_sinks

    @property
    def reach(self) -> Num:
        """Keys that a query sees at most."""
        return self.sinks + self.window

    def num_pairs(self) -> Num:
        """Sum over the queries' positions p of min(p + 1, num_sinks + window)."""
        first, last = self.len_keys - self.len_q, self.len_keys
        over = maximum(last - self.reach, 0), maximum(first - self.reach, 0)
        cut = (over[0] * (over[0] + 1) - over[1] * (over[1] + 1)) // 2
        return super().num_pairs() - cut

    def cache_bytes(self) -> Num:
        """Keys and values kept of all sequences of one layer."""
        kept = minimum(self.len_keys, self.reach)
        width = (self.head_dim + self.value_dim) * self.dtype.bytes_per_element
        return self.batch * self.kv_heads * kept * width

    def kv_elements(self) -> Num:
        """Elements of the K and V that some query sees."""
        before = maximum(self.len_keys - self.len_q - self.window + 1, 0)
        rows = self.len_keys - before + minimum(self.sinks, before)
        return self.batch * self.kv_heads * rows * (self.head_dim + self.value_dim)

    def stages(self) -> tuple[Stage, ...]:
        """Timed as decoding over what is kept, or as a prompt's attention with such a window.

        Kernels skip key blocks before the window; the sinks' are as many as they widen it by.
        """
        kept = minimum(self.len_keys, self.reach)
        if any_true(self.len_q > 1):
            prompt = PrefillAttention(
                batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
                len_q=self.len_q, len_kv=self.len_kv, head_dim=self.head_dim,
                value_dim=self.head_dim_v, window=kept, dtype=self.dtype,
            )  # fmt: skip
            return (Stage("attend", prompt),)
        token = DecodeAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_kv=kept, head_dim=self.head_dim, head_dim_v=self.head_dim_v, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("attend", token),)

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy, one masked softmax."""
        s = self.sizes()
        places = np.arange(s.len_kv - s.len_q, s.len_kv)
        return masked(self, inputs, self._seen(places, np.arange(s.len_kv)))

    def _seen(self, positions: Values, keys: Values) -> Values:
        """Which keys the queries at those positions see."""
        age = positions[:, None] - keys
        seen: Values = (age >= 0) & ((age < int(self.window)) | (keys < int(self.sinks)))
        return seen

    def key_blocks(
        self, s: Sizes, tiles: Mapping[str, int], rows: slice
    ) -> Iterator[tuple[slice, Values | None]]:
        """Sinks before the window without a mask, then the window."""
        off, bc = s.len_kv - s.len_q, tiles["bc"]
        positions = np.arange(rows.start, rows.stop) // s.group + off
        low = max(int(positions[0]) - int(self.window) + 1, 0)
        for cols in slices(min(int(self.sinks), low), bc):
            yield cols, None
        for part in slices(int(positions[-1]) + 1 - low, bc):
            cols = slice(part.start + low, part.stop + low)
            keys = np.arange(cols.start, cols.stop)
            # A sink inside the window's blocks is seen whatever its age.
            yield cols, self._seen(positions, keys) if tiles["br"] > 1 else None

    def query_sums(self, br: Num, bc: Num) -> QuerySums:
        """Closed forms, with off = len_kv - len_q and query blocks i = 0, 1, ... of br positions.

        Block i starts at position a = off + i br and its window at key a - window + 1, which is
        no key for the first `rising` blocks: they read a + br keys. The others read br + window - 1
        and, before these, min(num_sinks, a - window + 1) sinks, all of them from block `full` on.
        The last block may be shorter and is taken on its own.
        """
        len_q, len_kv, sinks = self.len_q, self.len_keys, self.sinks
        off, head = len_kv - len_q, ceil_div(len_q, br) - 1
        back = self.window - 1 - off  # minus the first block's first key
        rising = minimum(maximum(back // br + 1, 0), head)
        full = minimum(maximum(ceil_div(back + sinks, br), rising), head)
        steady, some, whole = br + self.window - 1, full - rising, head - full
        window = rising * off + br * (rising * (rising + 1) // 2) + (head - rising) * steady
        before = some * (rising * br - back) + br * (some * (some - 1) // 2) + whole * sinks
        steps = ceil_sum(off + br, br, rising, bc) + (head - rising) * ceil_div(steady, bc)
        steps = steps + ceil_sum(rising * br - back, br, some, bc) + whole * ceil_div(sinks, bc)
        low = maximum(head * br - back, 0)
        rest, last, end = minimum(sinks, low), len_q - head * br, len_kv - low
        area = br * window + last * end
        return QuerySums(
            cols=window + before + end + rest,
            area=area + br * before + last * rest,
            steps=br * steps + last * (ceil_div(end, bc) + ceil_div(rest, bc)),
            masked=where(br > 1, area, 0),
        )


# ---- shared by ops over parts of a sequence ------------------------------------------------


def masked(op: AttentionOp, inputs: Arrays, seen: Values) -> Arrays:
    """Naive attention under any mask that broadcasts to [heads, len_q, len_kv]: O, logsumexps."""
    p, lse = masked_probabilities(op, inputs, seen)
    return {"o": p @ np.repeat(inputs["v"], op.sizes().group, axis=1), "lse": lse}


def masked_probabilities(op: AttentionOp, inputs: Arrays, seen: Values) -> tuple[Values, Values]:
    """P[batch, heads, len_q, len_kv] and its logsumexp under that mask."""
    s = op.sizes()
    keys = np.repeat(inputs["k"], s.group, axis=1)
    scores = np.where(seen, inputs["q"] @ keys.swapaxes(-1, -2) * s.scale, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(scores - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / total, top + np.log(total)


def masked_gradient(op: AttentionOp, inputs: Arrays, seen: Values) -> Arrays:
    """dQ, dK and dV from do under that mask: the chain rule on whole matrices."""
    return gradients(op.sizes(), inputs, masked_probabilities(op, inputs, seen)[0])


def split_rows(x: Values, blocks: int) -> Values:
    """x[batch, heads, len, w] as [batch blocks, heads, len / blocks, w]: addressing, not work."""
    batch, heads, length, width = x.shape
    split = x.reshape(batch, heads, blocks, length // blocks, width)
    return split.swapaxes(1, 2).reshape(batch * blocks, heads, -1, width)


def join_rows(x: Values, batch: int) -> Values:
    """The inverse of `split_rows`."""
    _, heads, _, width = x.shape
    return (
        x.reshape(batch, -1, heads, x.shape[2], width)
        .swapaxes(1, 2)
        .reshape(batch, heads, -1, width)
    )

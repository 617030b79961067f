"""Fused attention of a prompt as serving kernels run it: windows, unequal value width, any format.

With b sequences, H query heads over G key-value heads, n queries and m keys a sequence, widths d
(queries and keys) and v (values), a query sees `pairs / n` keys on average:

    pairs   n m                                 no mask
            n (m - n) + n (n + 1) / 2           causal, the last query sees every key
            less what a window of w keys cuts off: sum over queries of max(0, seen - w)
    flops   2 b H pairs (d + v)                 special ops b H pairs
    bytes   e b (H n (d + v) + G m (d + v))     Q, O and K, V once

Counted once whatever the tiles (Dao 2023, arXiv 2307.08691: the forward pass without what a mask
drops). Where the value width is the head's and no window is set, `FlashAttention2` is the proved op
for the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.numeric import Num, any_true, maximum
from workloads.op import Op
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class PrefillAttention(Op):
    """`len_q` queries per sequence against `len_kv` keys (else the same), forward.

    `value_dim` defaults to `head_dim`, `window` to all keys.

    >>> op = PrefillAttention(num_heads=8, num_kv_heads=2, len_q=1024, head_dim=128)
    >>> op.pairs(), op.min_flops()[BF16] == 4 * 8 * 128 * 1024 * 1025 / 2
    (524800.0, True)
    """

    name: ClassVar[str] = "prefill_attention"
    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_q: Num
    len_kv: Num | None = None
    head_dim: Num
    value_dim: Num | None = None
    window: Num | None = None
    causal: bool = True
    dtype: DType = BF16
    out_dtype: DType | None = None

    def check(self) -> None:
        """Heads in equal groups; under a causal mask no more queries than keys."""
        if any_true(self.num_heads % self.kv_heads != 0):
            raise InputError(f"{self.name}: num_heads must be a multiple of num_kv_heads")
        if self.causal and any_true(self.len_q > self.keys):
            raise InputError(f"{self.name}: causal with len_q > len_kv leaves queries no key")
        if self.window is not None and not self.causal:
            raise InputError(f"{self.name}: a window needs causal=true")

    @property
    def kv_heads(self) -> Num:
        """Key-value heads; the query heads' number where left out."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def keys(self) -> Num:
        """Keys per sequence."""
        return self.len_q if self.len_kv is None else self.len_kv

    @property
    def value_width(self) -> Num:
        """Width of values and of the output."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def reach(self) -> Num:
        """Keys a query may see at most."""
        return self.keys if self.window is None else self.window

    def pairs(self) -> Num:
        """Query-key pairs that the mask leaves, per sequence and head."""
        n, m = self.len_q, self.keys
        if not self.causal:
            return n * m
        seen = n * (m - n) + n * (n + 1) / 2
        # queries that would see more than the window: over = seen - w = 1 ... for the last ones
        most, least = maximum(m - self.reach, 0), maximum(m - n - self.reach, 0)
        return seen - (most * (most + 1) - least * (least + 1)) / 2

    def min_flops(self) -> Mapping[DType, Num]:
        """2 b H pairs (d + v)."""
        width = self.head_dim + self.value_width
        return {self.dtype: 2 * self.batch * self.num_heads * self.pairs() * width}

    def query_bytes(self) -> Num:
        """Q once."""
        return (
            self.batch * self.num_heads * self.len_q * self.head_dim
            * self.dtype.bytes_per_element
        )  # fmt: skip

    def output_bytes(self) -> Num:
        """O once, in `out_dtype` or else `dtype`."""
        e = (self.out_dtype or self.dtype).bytes_per_element
        return self.batch * self.num_heads * self.len_q * self.value_width * e

    def kv_bytes(self) -> Num:
        """K and V once."""
        width = self.head_dim + self.value_width
        return self.batch * self.kv_heads * self.keys * width * self.dtype.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O once."""
        return self.query_bytes() + self.output_bytes() + self.kv_bytes()

    def work(self, fast_bytes: Num) -> Work:
        """One exponential and four other operations a pair; every tensor once."""
        pairs = self.batch * self.num_heads * self.pairs()
        return Work(
            tensor_flops=dict(self.min_flops()),
            vector_flops=4 * pairs,
            special_ops=pairs,
            read_bytes=self.query_bytes() + self.kv_bytes(),
            write_bytes=self.output_bytes(),
            launches=1,
        )

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No tile is chosen: the counts do not depend on one."""
        return {}


@dataclass(frozen=True, kw_only=True)
class MlaPrefill(PrefillAttention):
    """Latent attention over a prompt with keys and values expanded per head (DeepSeek-V2, 2024).

    `head_dim` holds the rotary part besides, `value_dim` is narrower: 192 and 128 in DeepSeek-V3.
    Source: arXiv 2405.04434, section 2.1.

    >>> MlaPrefill(num_heads=16, len_q=512, head_dim=192, value_dim=128).kv_heads
    16
    """

    name: ClassVar[str] = "mla_prefill"

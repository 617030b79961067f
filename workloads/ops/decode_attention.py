"""Attention of one new token over cached keys and values: grouped heads, and a shared latent.

Each query head reads `len_read` cached rows, all of them or those of a sliding window:

    o = softmax(q K^T / sqrt(d)) V,    q[batch, num_heads, d], one K and V a group of heads

`DecodeAttention` caches keys and values apart. `MlaDecode` is multi-head latent attention in its
absorbed form (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1): one latent vector a token stands
for the values of all heads, and with the rotary part behind it for their keys, so the cache holds
latent_dim + rope_dim elements a token and every head works on the same ones. The projections
into and out of the latent space are ops of their own.

All counts are minima over kernels: how the keys are split over blocks, and what adding up the
parts moves, is the kernel model's matter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.numeric import Num, any_true, minimum
from workloads.op import Op, require_fit
from workloads.work import Work

FP32_BYTES = 4
SCORE_FLOPS = 4
"""Vector flops a score: scale, running maximum, subtract, add to the sum."""


@dataclass(frozen=True, kw_only=True)
class CachedAttention(Op):
    """What decoding ops share: one query position a sequence, rows of a cache, three formats.

    `dtype` is the format of q and o, `kv_dtype` that of the cache and `product_dtype` that of the
    matrix products; left out, both follow `dtype`. `window` limits a query to its last positions.
    """

    batch: Num = 1
    num_heads: Num
    len_kv: Num
    window: Num | None = None
    dtype: DType = BF16
    kv_dtype: DType | None = None
    product_dtype: DType | None = None

    @property
    def cache_dtype(self) -> DType:
        """`kv_dtype`, else `dtype`."""
        return self.kv_dtype or self.dtype

    @property
    def matmul_dtype(self) -> DType:
        """`product_dtype`, else `dtype`."""
        return self.product_dtype or self.dtype

    @property
    def len_read(self) -> Num:
        """Cached positions that a query sees: min(window, len_kv)."""
        return self.len_kv if self.window is None else minimum(self.window, self.len_kv)

    @property
    @abstractmethod
    def cache_heads(self) -> Num:
        """Keys and values a cached token has."""

    @property
    @abstractmethod
    def key_dim(self) -> Num:
        """Elements of a query and of a key."""

    @property
    @abstractmethod
    def value_dim(self) -> Num:
        """Elements of a value and of an output."""

    @property
    @abstractmethod
    def row_elements(self) -> Num:
        """Elements that the cache holds of one token and one of its heads."""

    @property
    def heads_per_kv(self) -> Num:
        """Query heads that read the same rows."""
        return self.num_heads // self.cache_heads

    def cache_bytes(self) -> Num:
        """Bytes of all rows that are read, each once."""
        rows = self.batch * self.cache_heads * self.len_read
        return rows * self.row_elements * self.cache_dtype.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """The rows, q and o once."""
        elements = self.batch * self.num_heads * (self.key_dim + self.value_dim)
        return self.cache_bytes() + elements * self.dtype.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """q K^T and P V: 2 (key_dim + value_dim) a head and row."""
        pairs = self.batch * self.num_heads * self.len_read
        return {self.matmul_dtype: 2 * pairs * (self.key_dim + self.value_dim)}

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """All heads of a group beside one row at a time; fails where not even one head fits."""
        head = self.key_dim * self.dtype.bytes_per_element + FP32_BYTES * (self.value_dim + 2)
        row = self.row_elements * self.cache_dtype.bytes_per_element
        require_fit(self.name, fast_bytes, head + row, "one query head and one cached row")
        return {"heads": self.heads_per_kv}

    def work(self, fast_bytes: Num) -> Work:
        """Compulsory bytes; per score 4 vector flops and one exp, per head a normalised output."""
        self.tiling(fast_bytes)
        heads = self.batch * self.num_heads
        out_bytes = heads * self.value_dim * self.dtype.bytes_per_element
        return Work(
            tensor_flops=dict(self.min_flops()),
            vector_flops=heads * (SCORE_FLOPS * self.len_read + self.value_dim),
            special_ops=heads * (self.len_read + 1),
            read_bytes=self.compulsory_bytes() - out_bytes,
            write_bytes=out_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class DecodeAttention(CachedAttention):
    """One new token over cached K[batch, num_kv_heads, len_kv, head_dim] and V of the same shape.

    `num_kv_heads` left out follows `num_heads`, `head_dim_v` follows `head_dim`.

    >>> op = DecodeAttention(batch=4, num_heads=32, num_kv_heads=8, len_kv=4096, head_dim=128)
    >>> op.cache_bytes() == 4 * 8 * 4096 * 2 * 128 * 2
    True
    >>> op.over(window=1024, kv_dtype="fp8").cache_bytes() * 8 == op.cache_bytes()
    True
    """

    name: ClassVar[str] = "decode_attention"
    num_kv_heads: Num | None = None
    head_dim: Num
    head_dim_v: Num | None = None

    def check(self) -> None:
        """Refuse heads that do not divide."""
        if any_true(self.num_heads % self.cache_heads != 0):
            raise InputError(
                f"{self.name}: num_kv_heads = {self.num_kv_heads} must divide "
                f"num_heads = {self.num_heads}"
            )

    @property
    def cache_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def key_dim(self) -> Num:
        """`head_dim`."""
        return self.head_dim

    @property
    def value_dim(self) -> Num:
        """`head_dim_v`, else `head_dim`."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def row_elements(self) -> Num:
        """A key and a value."""
        return self.key_dim + self.value_dim


@dataclass(frozen=True, kw_only=True)
class MlaDecode(CachedAttention):
    """One new token over a cache of latents [batch, len_kv, latent_dim + rope_dim].

    >>> op = MlaDecode(num_heads=128, len_kv=8192)
    >>> op.cache_bytes() == 8192 * 576 * 2, op.min_flops()[BF16] == 2 * 128 * 8192 * (576 + 512)
    (True, True)
    """

    name: ClassVar[str] = "mla_decode"
    latent_dim: Num = 512
    rope_dim: Num = 64

    @property
    def cache_heads(self) -> Num:
        """One: all heads read the same latents."""
        return 1

    @property
    def key_dim(self) -> Num:
        """The latent and the rotary part."""
        return self.latent_dim + self.rope_dim

    @property
    def value_dim(self) -> Num:
        """The latent: the values' up-projection is absorbed into the output projection."""
        return self.latent_dim

    @property
    def row_elements(self) -> Num:
        """A key; its latent is the value."""
        return self.key_dim

"""Rotary position embedding: pairs of values turned by an angle that grows with position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, slices
from workloads.numeric import Num, any_true, floor, minimum
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.ops.streamed import Lanes
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class Rope(ProvedOp):
    """Rotary embedding of [num_tokens, num_heads, head_dim], dimension i paired with i + dim / 2.

    y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin: 3 flops per element (Su et al. 2021,
    arXiv 2104.09864, eq. 34). The cos and sin tables, FP32, have head_dim / 2 entries for each
    token and are read once for all its heads. The backward pass turns the other way and counts
    the same. Ignored: tables shared by the sequences of a batch, and how tables were made.

    >>> op = Rope(num_tokens=1000, num_heads=32, head_dim=128)
    >>> op.work(2**16).bytes == 1000 * 128 * (2 * 32 * 2 + 4)
    True
    """

    name: ClassVar[str] = "rope"
    num_tokens: Num
    num_heads: Num
    head_dim: Num
    dtype: DType = BF16

    def check(self) -> None:
        """Dimensions rotate in pairs."""
        if any_true(np.not_equal(self.head_dim % 2, 0)):
            raise InputError(f"{self.name}: head_dim = {self.head_dim} must be even")

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Tokens per `block`: their table entries beside one head's values."""
        held_bytes = self.head_dim * (FP32.bytes_per_element + self.dtype.bytes_per_element)
        require_fit(self.name, fast_bytes, held_bytes, "one token's table and one head")
        return {"block": minimum(self.num_tokens, floor(fast_bytes / held_bytes))}

    def work(self, fast_bytes: Num) -> Work:
        """Heads read and written once, the table read once."""
        self.tiling(fast_bytes)
        elements = self.num_tokens * self.num_heads * self.head_dim
        size = elements * self.dtype.bytes_per_element
        return Work(
            vector_flops=3 * elements, read_bytes=size + self._table_bytes(), write_bytes=size
        )

    def min_flops(self) -> Mapping[DType, Num]:
        """No matrix products."""
        return {}

    def compulsory_bytes(self) -> Num:
        """Heads in and out, and the table."""
        elements = self.num_tokens * self.num_heads * self.head_dim
        return 2 * elements * self.dtype.bytes_per_element + self._table_bytes()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x[num_tokens, num_heads, head_dim], cos and sin [num_tokens, head_dim / 2]."""
        t, h, d = (int(v) for v in (self.num_tokens, self.num_heads, self.head_dim))
        angle = np.arange(t)[:, None] * 10_000.0 ** (-2 * np.arange(d // 2) / d)
        return {"x": rng.standard_normal((t, h, d)), "cos": np.cos(angle), "sin": np.sin(angle)}

    def reference(self, inputs: Arrays) -> Arrays:
        """Pairs as complex numbers, multiplied by cos + i sin."""
        first, second = np.split(inputs["x"], 2, axis=-1)
        turn = (inputs["cos"] + 1j * inputs["sin"])[:, None, :]
        turned = (first + 1j * second) * turn
        return {"y": np.concatenate([turned.real, turned.imag], axis=-1)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Blocks of tokens; each head is turned in place beside the block's table."""
        x = machine.place(inputs["x"], self.dtype)
        tables = [machine.place(inputs[key], FP32) for key in ("cos", "sin")]
        y = machine.empty(x.values.shape, self.dtype)
        half = int(self.head_dim) // 2
        block = int(self.tiling(machine.fast_bytes)["block"])
        with machine.kernel():
            for tokens in slices(int(self.num_tokens), block):
                with machine.scope():
                    cos, sin = (Lanes(machine, machine.load(t, tokens).values) for t in tables)
                    for head in range(int(self.num_heads)):
                        with machine.scope():
                            tile = machine.load(x, (tokens, head))
                            first = Lanes(machine, tile.values[:, :half])
                            second = Lanes(machine, tile.values[:, half:])
                            turned = (first * cos - second * sin, second * cos + first * sin)
                            values = np.concatenate([part.values for part in turned], axis=-1)
                            machine.store(Lanes(machine, values).into(tile), y, (tokens, head))
        return {"y": y.values}

    def _table_bytes(self) -> Num:
        return self.num_tokens * self.head_dim * FP32.bytes_per_element

"""Means over blocks of rows: landmarks of keys, pooled queries, chunk representatives.

y[b, i] = mean of x[b, i block : (i + 1) block], a ragged last block over what it has:

    reads  b len dim e     writes  b ceil(len / block) dim e     vector  b dim (len + blocks)

`kind` "sum" and "max" leave out the division, one flop a block and column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, slices
from workloads.numeric import Num, any_true, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.work import Work

KINDS: Final = ("mean", "sum", "max")


@dataclass(frozen=True, kw_only=True)
class BlockPool(ProvedOp):
    """x[batch, len_seq, dim] -> y[batch, ceil(len_seq / block), dim], in `out_dtype` or `dtype`.

    >>> BlockPool(batch=4, len_seq=1000, dim=128, block=8).num_blocks
    125
    """

    name: ClassVar[str] = "block_pool"
    cheaper: ClassVar[tuple[str, ...]] = ("block",)
    batch: Num = 1
    len_seq: Num
    dim: Num
    block: Num
    dtype: DType = BF16
    out_dtype: DType | None = None
    kind: str = "mean"

    def check(self) -> None:
        """A block no longer than the sequence, a known kind."""
        if self.kind not in KINDS:
            raise InputError(f"{self.name}: kind = '{self.kind}' must be one of {', '.join(KINDS)}")
        if any_true(self.block > self.len_seq):
            raise InputError(
                f"{self.name}: block = {self.block} is longer than len_seq = {self.len_seq}"
            )

    @property
    def written_dtype(self) -> DType:
        """`out_dtype`, else `dtype`."""
        return self.out_dtype or self.dtype

    @property
    def num_blocks(self) -> Num:
        """Blocks of a sequence."""
        return ceil_div(self.len_seq, self.block)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Columns of a block held beside their fp32 sum."""
        held = self.block * self.dtype.bytes_per_element + 4
        require_fit(self.name, fast_bytes, held, "one column of a block")
        return {"cols": minimum(self.dim, floor(fast_bytes / held))}

    def work(self, fast_bytes: Num) -> Work:
        """The module's equations."""
        self.tiling(fast_bytes)
        e, out = self.dtype.bytes_per_element, self.written_dtype.bytes_per_element
        divisions = self.num_blocks * (self.kind == "mean")
        return Work(
            vector_flops=self.batch * self.dim * (self.len_seq + divisions),
            read_bytes=self.batch * self.len_seq * self.dim * e,
            write_bytes=self.batch * self.num_blocks * self.dim * out,
        )

    def streamed_elements(self) -> Num:
        """Elements read."""
        return self.batch * self.len_seq * self.dim

    def compulsory_bytes(self) -> Num:
        """Rows once, means once."""
        e, out = self.dtype.bytes_per_element, self.written_dtype.bytes_per_element
        return self.batch * self.dim * (self.len_seq * e + self.num_blocks * out)

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random rows."""
        return {"x": rng.standard_normal((int(self.batch), int(self.len_seq), int(self.dim)))}

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy."""
        parts = slices(int(self.len_seq), int(self.block))
        pooled = [getattr(inputs["x"][:, part], self.kind)(axis=1) for part in parts]
        return {"y": np.stack(pooled, axis=1)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, block by block."""
        x = machine.place(inputs["x"], self.dtype)
        shape = (int(self.batch), int(self.num_blocks), int(self.dim))
        y = machine.empty(shape, self.written_dtype)
        self.run(machine, x, y)
        return {"y": y.values}

    def run(self, machine: Machine, x: SlowArray, y: SlowArray) -> None:
        """From rows to means, both in slow memory."""
        cols = int(self.tiling(machine.fast_bytes)["cols"])
        with machine.kernel():
            for batch in range(int(self.batch)):
                for i, part in enumerate(slices(int(self.len_seq), int(self.block))):
                    for col in slices(int(self.dim), cols):
                        with machine.scope():
                            held = machine.load(x, (batch, part, col))
                            reduced = "max" if self.kind == "max" else "sum"
                            total = machine.reduce(reduced, held, axis=0)
                            if self.kind == "mean":
                                machine.vector(total.values / (part.stop - part.start), into=total)
                            machine.store(total, y, (batch, slice(i, i + 1), col))

"""Casting a tensor of a training step to a narrow format, with its scales, in one or two layouts.

    largest   (where one scale serves the whole tensor, and is not known) reads x, one kernel
    cast      reads x, writes the codes; a second copy lies across, for the product that sums
              over the other axis: from the same kernel, or (`split`) from one of its own that
              reads x again

    read     n e_in  ([largest] + (copies if split else 1))
    written  n e_out copies
    vector   n for the largest magnitude, n for every copy's multiplication; where the scale is
             not known but shared by a row or a block, its maximum is found while the tile is
             held: n more a kernel that casts

Scales of blocks are part of the format's bytes; one of a row or of the whole tensor is left out.
Transposing a copy costs nothing beyond its bytes here: fast memory does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP8, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, slices
from workloads.numeric import Num, any_true
from workloads.op import Arrays
from workloads.ops.streamed import Lanes, StreamedOp, stream
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class QuantiseTensor(StreamedOp):
    """x[num_elements] in `dtype` -> `copies` arrays in `out_dtype`.

    `largest`: one scale for all of x, found by a kernel before. `local`: scales are found while
    casting. Neither: the scale is known (that of the step before, or x is a copy already cast).

    >>> QuantiseTensor(num_elements=10**6, largest=True, copies=2).work(2**16).bytes
    6000000.0
    """

    name: ClassVar[str] = "quantise_tensor"
    num_elements: Num
    copies: Num = 1
    largest: bool = False
    local: bool = False
    split: bool = False
    dtype: DType = BF16
    out_dtype: DType = FP8

    def check(self) -> None:
        """One layout or both; a scale is of all of x or of its parts."""
        if any_true((np.asarray(self.copies) != 1) & (np.asarray(self.copies) != 2)):
            raise InputError(f"{self.name}: copies = {self.copies} is neither 1 nor 2")
        if self.largest and self.local:
            raise InputError(f"{self.name}: a scale is of the whole tensor or local, not both")

    @property
    def num_casts(self) -> Num:
        """Kernels that cast."""
        return self.copies if self.split else 1

    def elements(self) -> Num:
        """Of x."""
        return self.num_elements

    def read_bytes(self) -> Num:
        """Per element, by all kernels together."""
        return self.dtype.bytes_per_element * (self.largest + self.num_casts)

    def write_bytes(self) -> Num:
        """Per element, all copies."""
        return self.out_dtype.bytes_per_element * self.copies

    def steps(self) -> tuple[Num, Num]:
        """Maxima and multiplications per element."""
        return self.largest + self.local * self.num_casts + self.copies, 0

    def work(self, fast_bytes: Num) -> Work:
        """The module's counts; a launch for every kernel."""
        once = super().work(fast_bytes)
        return Work(
            vector_flops=once.vector_flops,
            read_bytes=once.read_bytes,
            write_bytes=once.write_bytes,
            launches=self.largest + self.num_casts,
        )

    def compulsory_bytes(self) -> Num:
        """x once, every copy once."""
        return self.num_elements * (self.dtype.bytes_per_element + self.write_bytes())

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random values."""
        return {"x": rng.standard_normal(int(self.num_elements))}

    def reference(self, inputs: Arrays) -> Arrays:
        """x over its largest magnitude, or over each element's own."""
        x = inputs["x"]
        scale = np.abs(x).max() if self.largest else np.abs(x) if self.local else 1.0
        return {f"y{i}": x / scale for i in range(int(self.copies))}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The largest magnitude, where asked for, then the kernels that cast."""
        x = machine.place(inputs["x"], self.dtype)
        n, copies = int(self.num_elements), int(self.copies)
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        best = 0.0
        if self.largest:
            with machine.kernel():
                for part in slices(n, chunk):
                    with machine.scope():
                        tile = machine.load(x, part)
                        machine.count(vector=tile.values.size)
                        best = max(best, float(np.abs(tile.values).max()))
        targets = [machine.empty((n,), self.out_dtype) for _ in range(copies)]

        def scaled(lanes: Sequence[Lanes]) -> tuple[Lanes, ...]:
            (own,) = lanes
            scale = np.full(own.values.shape, best if self.largest else 1.0)
            if self.local:
                machine.count(vector=own.values.size)
                scale = np.abs(own.values)
            inverse = Lanes(machine, 1 / scale)
            return tuple(own * inverse for _ in written)

        for written in [[t] for t in targets] if self.split else [targets]:
            stream(machine, [x], written, chunk, scaled)
        return {f"y{i}": target.values for i, target in enumerate(targets)}

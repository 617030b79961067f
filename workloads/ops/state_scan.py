"""Scan of a diagonal linear state with one decay for all steps: x_t = A x_{t-1} + u_t.

A is complex and diagonal, the same at every step and in every row (S5, ConvS5 with pointwise state
kernels). An element of the scan is (A^n, x), n the steps it covers; of the elements that a
combination joins, the later one covers d steps, d the distance between the two:

    (A^m, x) * (A^d, y) = (A^(m + d), A^d x + y)

so no decay is stored or moved with an element: a chunk of c steps needs A^1, A^2, A^4, ... below c,
that is ceil(log2 c) - 1 products of A with itself in the whole kernel, and 8 flops a state for each
combination (a complex product and a sum). How a chunk is scanned, and how chunks hand on, is as in
`associative_scan`: a chunk's first step takes in the state before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import FP32, DType
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, ceil_log2, floor, maximum, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.associative_scan import BRENT_KUNG, KOGGE_STONE, SEQUENTIAL, AssociativeScan
from workloads.ops.elementwise import Elementwise
from workloads.work import Work

COMPLEX: Final = 2
"""Numbers of a complex value."""
JOIN_FLOPS: Final = 8
"""A complex product and a complex sum."""
PRODUCT_FLOPS: Final = 6


@dataclass(frozen=True, kw_only=True)
class StateScan(ProvedOp):
    """States x[rows, len_seq, 2 state_dim] from u of that shape: real parts, then imaginary ones.

    With `held` the scan goes on from states x_0[rows, 2 state_dim] that it reads.

    >>> op = StateScan(rows=1, len_seq=1024, state_dim=16)
    >>> op.work(2**18).vector_flops == 2036 * 8 * 16 + 9 * 6 * 16
    True
    """

    name: ClassVar[str] = "state_scan"
    cheaper: ClassVar[tuple[str, ...]] = ("chunk",)
    rows: Num
    len_seq: Num
    state_dim: Num
    chunk: Num = 1024
    algorithm: str = BRENT_KUNG
    held: bool = False
    dtype: DType = FP32

    def check(self) -> None:
        """An algorithm that the associative scan knows."""
        self.order()

    def order(self) -> AssociativeScan:
        """Which elements are combined: the associative scan of one row."""
        return AssociativeScan(
            len_seq=self.len_seq, width=self.state_dim, chunk=self.chunk, operator="complex",
            algorithm=self.algorithm, dtype=self.dtype,
        )  # fmt: skip

    def depth(self) -> Num:
        """Dependent combinations."""
        return self.order().depth() + self.held

    @property
    def step_bytes(self) -> Num:
        """The state of one row at one step."""
        return COMPLEX * self.state_dim * self.dtype.bytes_per_element

    def squarings(self) -> Num:
        """Products of A with itself: to the greatest distance inside a chunk."""
        if self.algorithm == SEQUENTIAL:
            return 0
        return maximum(ceil_log2(minimum(self.chunk, self.len_seq)) - 1, 0)

    def flops(self) -> Num:
        """Combinations of all rows and the powers of A."""
        joined = self.rows * (self.order().combinations() + self.held)
        return self.state_dim * (JOIN_FLOPS * joined + PRODUCT_FLOPS * self.squarings())

    def stages(self) -> tuple[Stage, ...]:
        """Timed as one pass over the states; the chain of dependent steps is not."""
        numbers = self.rows * self.len_seq * COMPLEX * self.state_dim
        given = (self.held * self.rows + 1) * self.state_dim  # read alone: half of an element each
        one = Elementwise(
            num_elements=numbers + given, dtype=self.dtype,
            vector_flops_per_element=self.flops() / (numbers + given),
        )  # fmt: skip
        return (Stage("scan", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """`chunk` steps of `lanes` channels beside the state before them and the powers of A."""
        chunk = minimum(self.chunk, self.len_seq)
        lane = (chunk + 2 + self.squarings()) * COMPLEX * self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, lane, "one chunk of a channel; make chunk smaller")
        return {"chunk": chunk, "lanes": minimum(self.state_dim, floor(fast_bytes / lane))}

    def work(self, fast_bytes: Num) -> Work:
        """u in, x out, A once, and the states held."""
        self.tiling(fast_bytes)
        moved = self.rows * self.len_seq * self.step_bytes
        return Work(
            vector_flops=self.flops(),
            read_bytes=moved + self.step_bytes * (1 + self.held * self.rows),
            write_bytes=moved,
        )

    def compulsory_bytes(self) -> Num:
        """u and A in, x out, and the states held."""
        return (2 * self.rows * self.len_seq + self.held * self.rows + 1) * self.step_bytes

    def min_flops(self) -> Mapping[DType, Num]:
        """No matrix products."""
        return {}

    # ---- the program -------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """u, a decay of modulus below one, and the states held."""
        rows, length, states = int(self.rows), int(self.len_seq), int(self.state_dim)
        decay = rng.uniform(0, 1, states) * np.exp(1j * rng.uniform(-np.pi, np.pi, states))
        made = {"u": rng.standard_normal((rows, length, 2 * states)), "a": _parts(decay)}
        return made | ({"x0": rng.standard_normal((rows, 2 * states))} if self.held else {})

    def reference(self, inputs: Arrays) -> Arrays:
        """Step after step."""
        u, a = _complex(inputs["u"]), _complex(inputs["a"])
        state = _complex(inputs["x0"]) if self.held else np.zeros_like(u[:, 0])
        x = np.zeros_like(u)
        for t in range(int(self.len_seq)):
            state = a * state + u[:, t]
            x[:, t] = state
        return {"x": _parts(x)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: channels in parts, their powers of A, then rows in turn, chunk by chunk."""
        states, lanes = int(self.state_dim), int(self.tiling(machine.fast_bytes)["lanes"])
        slow = {
            name: machine.place(values.reshape(*values.shape[:-1], COMPLEX, states), self.dtype)
            for name, values in inputs.items()
        }
        x = machine.empty(slow["u"].values.shape, self.dtype)
        with machine.kernel():
            for part in slices(states, lanes):
                with machine.scope():
                    powers = self._powers(machine, machine.load(slow["a"], (..., part)))
                    for row in range(int(self.rows)):
                        with machine.scope():
                            self._row(machine, slow, x, powers, (row, part))
        return {"x": x.values.reshape(inputs["u"].shape)}

    def _powers(self, mc: Machine, decay: Tile) -> list[Tile]:
        """A^1, A^2, A^4, ... as far as combinations reach."""
        powers = [decay]
        for _ in range(int(self.squarings())):
            square = _pair(_number(powers[-1].values) ** 2)
            powers.append(mc.vector(square, per_element=PRODUCT_FLOPS / 2, dtype=self.dtype))
        return powers

    def _row(
        self,
        mc: Machine,
        slow: dict[str, SlowArray],
        x: SlowArray,
        powers: list[Tile],
        at: tuple[int, slice],
    ) -> None:
        """Some channels of one row."""
        row, lanes = at
        if self.held:
            before = mc.load(slow["x0"], (row, ..., lanes))
        else:
            before = mc.full(powers[0].shape, 0.0, self.dtype)
        for part in slices(int(self.len_seq), int(self.chunk)):
            with mc.scope():
                held = mc.load(slow["u"], (row, part, ..., lanes))
                if part.start or self.held:
                    self._join(mc, held, powers[0], before.values, [0])
                self._chunk(mc, held, powers)
                mc.store(held, x, (row, part, ..., lanes))
                before.values[...] = held.values[-1]

    def _chunk(self, mc: Machine, held: Tile, powers: list[Tile]) -> None:
        """The chunk in place, in the algorithm's order."""
        size = held.shape[0]
        if self.algorithm == SEQUENTIAL:
            for t in range(1, size):
                self._join(mc, held, powers[0], held.values[t - 1 : t], [t])
            return
        steps = [(2**i, powers[i]) for i in range(int(ceil_log2(size)))]
        if self.algorithm == KOGGE_STONE:
            for d, power in steps:
                self._join(mc, held, power, held.values[: size - d].copy(), list(range(d, size)))
            return
        for d, power in steps:
            self._pairs(mc, held, power, d, range(2 * d - 1, size, 2 * d))
        for d, power in reversed(steps):
            self._pairs(mc, held, power, d, range(3 * d - 1, size, 2 * d))

    def _pairs(self, mc: Machine, held: Tile, power: Tile, d: int, ends: range) -> None:
        if ends:
            self._join(mc, held, power, held.values[[i - d for i in ends]], list(ends))

    def _join(self, mc: Machine, held: Tile, power: Tile, before: Values, at: list[int]) -> None:
        """States `at` take in the states `before`, as many steps earlier as A has been raised."""
        added = _number(power.values) * _number(before)
        held.values[at] += _pair(added)
        mc.count(vector=JOIN_FLOPS * len(at) * power.shape[-1])


def _number(x: Values) -> Values:
    """Complex numbers of x[..., 2, n]."""
    return np.asarray(x[..., 0, :] + 1j * x[..., 1, :])


def _pair(x: Values) -> Values:
    return np.stack([x.real, x.imag], axis=-2)


def _complex(x: Values) -> Values:
    half = x.shape[-1] // 2
    return np.asarray(x[..., :half] + 1j * x[..., half:])


def _parts(x: Values) -> Values:
    return np.concatenate([x.real, x.imag], axis=-1)

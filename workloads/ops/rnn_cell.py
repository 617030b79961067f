"""Pointwise part of recurrent cells: gates and new states from the pre-activations of one step.

With x = W x_t of the input, r = R y_(t-1) of the state and biases b, per hidden unit:

    elman   y = tanh(x + r + b)
    lstm    i, f, z, o = x + r + b;  c' = s(f) c + s(i) tanh(z);  y = s(o) tanh(c')
    gru     g = r_0 + b_0;  q, z = x_01 + r_12 + b_12;  n = x_2 + b_3
            y = s(z) y + (1 - s(z)) tanh(n + s(q) g)
    slstm   i, f, z, o = x + r + b;  a = log s(f) + m;  m' = max(i, a)
            i' = exp(i - m');  f' = exp(a - m');  c' = f' c + i' tanh(z)
            n' = max(f' n + i', 1);  y = s(o) c' / n'

s is the sigmoid: an add, an exp, a reciprocal; its logarithm an exp, an add, a log. Sources:
Hochreiter and Schmidhuber 1997; Cho et al. 2014; Beck et al. 2024, arXiv 2405.04517, appendix A.1
(slstm); arXiv 2412.07752, which runs all four. That an slstm whose n is 0 starts with m' = i, as
there, is what m = -inf does here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import UnknownNameError
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import Elementwise
from workloads.ops.streamed import Lanes
from workloads.work import Work

FP32_BYTES: Final = FP32.bits // 8

Step: TypeAlias = Callable[
    [Sequence[Lanes], Sequence[Lanes], Sequence[Lanes], Sequence[Lanes]],
    tuple[Sequence[Lanes], Sequence[Lanes]],
]
"""From x, r, b and the states that are read to all new states, y first, and the gates kept."""
NaiveStep: TypeAlias = Callable[[Values, Values, Values, Values], tuple[Values, ...]]
"""The new states alone; gates and states on the last axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Gates that take the state, the input and a bias; states, and which of them a step reads
    beside y's product; gates that training keeps; operations per unit."""

    from_state: int
    from_input: int
    biases: int
    states: int
    read: tuple[int, ...]
    kept: int
    vector_flops: int
    special_ops: int
    run: Step
    naive: NaiveStep

    @property
    def read_slice(self) -> slice:
        """The states that are read, which lie side by side."""
        return slice(self.read[0], self.read[-1] + 1) if self.read else slice(0, 0)


def _sigmoid(x: Lanes) -> Lanes:
    return (1 + (-x).exp()).reciprocal()


def _log(x: Lanes) -> Lanes:
    x.machine.count(special=x.values.size)
    return Lanes(x.machine, np.log(x.values))


def _larger(x: Lanes, y: Lanes | float) -> Lanes:
    x.machine.count(vector=x.values.size)
    return Lanes(x.machine, np.maximum(x.values, y.values if isinstance(y, Lanes) else y))


def _summed(x: Sequence[Lanes], r: Sequence[Lanes], b: Sequence[Lanes]) -> list[Lanes]:
    return [p + q + s for p, q, s in zip(x, r, b, strict=True)]


def _elman(
    x: Sequence[Lanes], r: Sequence[Lanes], b: Sequence[Lanes], states: Sequence[Lanes]
) -> tuple[Sequence[Lanes], Sequence[Lanes]]:
    (total,) = _summed(x, r, b)
    return (total.tanh(),), (total,)


def _lstm(
    x: Sequence[Lanes], r: Sequence[Lanes], b: Sequence[Lanes], states: Sequence[Lanes]
) -> tuple[Sequence[Lanes], Sequence[Lanes]]:
    i, f, z, o = _summed(x, r, b)
    i, f, z, o = _sigmoid(i), _sigmoid(f), z.tanh(), _sigmoid(o)
    c = f * states[0] + i * z
    return (o * c.tanh(), c), (i, f, z, o)


def _gru(
    x: Sequence[Lanes], r: Sequence[Lanes], b: Sequence[Lanes], states: Sequence[Lanes]
) -> tuple[Sequence[Lanes], Sequence[Lanes]]:
    g, n = r[0] + b[0], x[2] + b[3]
    q, z = _summed(x[:2], r[1:], b[1:3])
    z = _sigmoid(z)
    y = z * states[0] + (1 - z) * (n + _sigmoid(q) * g).tanh()
    return (y,), (g, q, z, n)


def _slstm(
    x: Sequence[Lanes], r: Sequence[Lanes], b: Sequence[Lanes], states: Sequence[Lanes]
) -> tuple[Sequence[Lanes], Sequence[Lanes]]:
    i, f, z, o = _summed(x, r, b)
    c, n, m = states
    a = m - _log(1 + (-f).exp())
    m = _larger(i, a)
    i, f, o = (i - m).exp(), (a - m).exp(), _sigmoid(o)
    c = f * c + i * z.tanh()
    n = _larger(f * n + i, 1.0)
    return (o * c * n.reciprocal(), c, n, m), (i, f, z, o)


def _naive_sigmoid(x: Values) -> Values:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


def _naive_lstm(x: Values, r: Values, b: Values, s: Values) -> tuple[Values, ...]:
    i, f, z, o = np.moveaxis(x + r + b, -1, 0)
    c = _naive_sigmoid(f) * s[..., 1] + _naive_sigmoid(i) * np.tanh(z)
    return _naive_sigmoid(o) * np.tanh(c), c


def _naive_gru(x: Values, r: Values, b: Values, s: Values) -> tuple[Values, ...]:
    q = _naive_sigmoid(x[..., 0] + r[..., 1] + b[..., 1])
    z = _naive_sigmoid(x[..., 1] + r[..., 2] + b[..., 2])
    n = np.tanh(x[..., 2] + b[..., 3] + q * (r[..., 0] + b[..., 0]))
    return (n + z * (s[..., 0] - n),)


def _naive_slstm(x: Values, r: Values, b: Values, s: Values) -> tuple[Values, ...]:
    i, f, z, o = np.moveaxis(x + r + b, -1, 0)
    a = s[..., 3] - np.logaddexp(0, -f)
    m = np.maximum(i, a)
    c = np.exp(a - m) * s[..., 1] + np.exp(i - m) * np.tanh(z)
    n = np.maximum(np.exp(a - m) * s[..., 2] + np.exp(i - m), 1)
    return _naive_sigmoid(o) * c / n, c, n, m


CELLS: Final[Mapping[str, Cell]] = {
    "lstm": Cell(
        from_state=4, from_input=4, biases=4, states=2, read=(1,), kept=4,
        vector_flops=15, special_ops=8, run=_lstm, naive=_naive_lstm,
    ),
    "gru": Cell(
        from_state=3, from_input=3, biases=4, states=1, read=(0,), kept=4,
        vector_flops=14, special_ops=5, run=_gru, naive=_naive_gru,
    ),
    "slstm": Cell(
        from_state=4, from_input=4, biases=4, states=4, read=(1, 2, 3), kept=4,
        vector_flops=22, special_ops=8, run=_slstm, naive=_naive_slstm,
    ),
    "elman": Cell(
        from_state=1, from_input=1, biases=1, states=1, read=(), kept=1,
        vector_flops=2, special_ops=1, run=_elman,
        naive=lambda x, r, b, s: (np.tanh(x + r + b)[..., 0],),
    ),
}  # fmt: skip


def cell_of(name: str) -> Cell:
    """The cell of that name; raises `UnknownNameError`."""
    if name not in CELLS:
        raise UnknownNameError("recurrent cell", name, list(CELLS))
    return CELLS[name]


def split(machine: Machine, values: Values) -> list[Lanes]:
    """The entries of the last axis as vector lanes."""
    return [Lanes(machine, values[..., i]) for i in range(values.shape[-1])]


def naive_step(cell: Cell, x: Values, r: Values, b: Values, states: Values) -> Values:
    """All new states on the last axis, in plain NumPy."""
    return np.stack(cell.naive(x, r, b, states), axis=-1)


@dataclass(frozen=True, kw_only=True)
class RnnCell(ProvedOp):
    """One step of a cell for `batch` sequences of `units` hidden units, as one kernel.

    x[batch, units, gates], r[batch, units, gates], biases b[units, gates], states
    s[batch, units, states] before and after, all in `dtype`; `training` writes the gates as well.

    >>> op = RnnCell(cell="lstm", batch=16, units=768)
    >>> op.work(2**17).bytes == 16 * 768 * (4 + 4 + 1 + 2) * 2 + 768 * 4 * 2
    True
    """

    name: ClassVar[str] = "rnn_cell"
    cell: str = "lstm"
    batch: Num
    units: Num
    training: bool = False
    dtype: DType = BF16

    def check(self) -> None:
        """A known cell."""
        cell_of(self.cell)

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a pointwise fp32 kernel that reads and writes as many bytes."""
        work = self.work(float(2**52))
        elements = ceil_div(work.bytes, 2 * FP32_BYTES)
        one = Elementwise(
            num_elements=elements, vector_flops_per_element=work.vector_flops / elements,
            special_ops_per_element=work.special_ops / elements, dtype=FP32,
        )  # fmt: skip
        return (Stage("cell", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Units whose biases are held while the sequences pass, one after another."""
        cell, e = cell_of(self.cell), self.dtype.bytes_per_element
        reads = cell.from_state + cell.from_input + cell.biases + len(cell.read)
        unit = reads * e + (cell.states + cell.kept) * FP32_BYTES
        require_fit(self.name, fast_bytes, unit, "one hidden unit")
        return {"units": minimum(self.units, floor(fast_bytes / unit))}

    def work(self, fast_bytes: Num) -> Work:
        """Everything once."""
        self.tiling(fast_bytes)
        cell, e = cell_of(self.cell), self.dtype.bytes_per_element
        elements = self.batch * self.units
        reads = cell.from_state + cell.from_input + len(cell.read)
        return Work(
            vector_flops=elements * cell.vector_flops,
            special_ops=elements * cell.special_ops,
            read_bytes=(elements * reads + self.units * cell.biases) * e,
            write_bytes=elements * (cell.states + int(self.training) * cell.kept) * e,
        )

    def compulsory_bytes(self) -> Num:
        """Everything once."""
        return self.work(float(2**52)).bytes

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, r, b and states; the normaliser of an slstm is positive."""
        cell, shape = cell_of(self.cell), (int(self.batch), int(self.units))
        return {
            "x": rng.standard_normal((*shape, cell.from_input)),
            "r": rng.standard_normal((*shape, cell.from_state)),
            "b": rng.standard_normal((shape[1], cell.biases)),
            "s": rng.standard_normal((*shape, cell.states)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The module's equations over all units at once."""
        x, r, b, states = (inputs[name] for name in ("x", "r", "b", "s"))
        return {"s": naive_step(cell_of(self.cell), x, r, b, states)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel; the gates it keeps are part of the count, not of the result."""
        x, r, b, s = (machine.place(inputs[name], self.dtype) for name in ("x", "r", "b", "s"))
        made = machine.empty(s.values.shape, self.dtype)
        self.run(machine, x, r, b, s, made)
        return {"s": made.values}

    def run(
        self, machine: Machine, x: SlowArray, r: SlowArray, b: SlowArray, s: SlowArray,
        made: SlowArray,
    ) -> None:  # fmt: skip
        """One kernel from arrays in slow memory to the states there."""
        cell = cell_of(self.cell)
        kept = machine.empty((*made.values.shape[:-1], cell.kept), self.dtype)
        with machine.kernel():
            for cols in slices(int(self.units), int(self.tiling(machine.fast_bytes)["units"])):
                with machine.scope():
                    biases = split(machine, machine.load(b, cols).values)
                    for row in range(int(self.batch)):
                        with machine.scope():
                            where = (row, cols)
                            given = split(machine, machine.load(x, where).values)
                            product = split(machine, machine.load(r, where).values)
                            states = machine.load(s, (*where, cell.read_slice)).values
                            held = split(machine, states)
                            after, gates = cell.run(given, product, biases, held)
                            store(machine, after, made, where)
                            if self.training:
                                store(machine, gates, kept, where)


def store(
    machine: Machine, found: Sequence[Lanes], target: SlowArray, where: tuple[object, ...]
) -> None:
    """Lanes to the last axis of a slow array, one after another."""
    for i, lanes in enumerate(found):
        tile = lanes.keep(FP32)
        machine.store(tile, target, (*where, i))
        machine.free(tile)

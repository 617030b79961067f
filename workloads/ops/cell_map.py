"""Gates of recurrent cells as pointwise kernels: named maps beside those of `elementwise`.

    sigmoid_mul   y = sigmoid(x0) x1
    quasi_gates   f = sigmoid(x0 + b), u = sigmoid(x1) tanh(x2)        b = 1 (forget bias)
    cell_output   h = sigmoid(x0) tanh(x1)
    lstm_cell     c = sigmoid(x0 + x4 + b) x8 + sigmoid(x1 + x5) tanh(x2 + x6),
                  h = sigmoid(x3 + x7) tanh(c)

A sigmoid is one add, one exp and one reciprocal; negation is an operand modifier and free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true
from workloads.op import Arrays
from workloads.ops.elementwise import Elementwise, Formula
from workloads.ops.streamed import Lanes, stream

FORGET_BIAS: Final = 1.0
"""Added to the forget gate (Languini's cells, after Jozefowicz et al. 2015)."""
DEFAULTS: Final = {
    "num_inputs": 1, "num_outputs": 1, "vector_flops_per_element": 1, "special_ops_per_element": 0,
}  # fmt: skip
"""What `Elementwise` has where nothing is said: the map's own counts take their place."""
SIGMOID_MUL, CELL_OUTPUT = "sigmoid_mul", "cell_output"
QUASI_GATES, LSTM_CELL = "quasi_gates", "lstm_cell"


@dataclass(frozen=True, kw_only=True)
class CellMap(Elementwise):
    """A named map of this module; `num_inputs` and the other counts follow from the name.

    >>> CellMap(num_elements=1000, formula="sigmoid_mul").work(2**16).vector_flops
    2000
    """

    name: ClassVar[str] = "cell_map"
    formula: str = SIGMOID_MUL

    def check(self) -> None:
        """A known map; the counts are its own."""
        if self.formula not in MAPS:
            raise UnknownNameError("cell map", self.formula, list(MAPS))
        for field, stated in _stated(MAPS[self.formula]).items():
            given = getattr(self, field)
            if any_true(np.not_equal(given, stated) & np.not_equal(given, DEFAULTS[field])):
                raise InputError(f"{self.name}: {self.formula} has {field} = {stated}; leave it")
            object.__setattr__(self, field, stated)

    def reference(self, inputs: Arrays) -> Arrays:
        """The map in plain NumPy."""
        found = MAPS[self.formula].naive([inputs[f"x{i}"] for i in range(int(self.num_inputs))])
        return {f"y{i}": y for i, y in enumerate(found)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Chunk after chunk in one kernel."""
        given = [machine.place(inputs[f"x{i}"], self.dtype) for i in range(int(self.num_inputs))]
        shape = (int(self.num_elements),)
        made = [machine.empty(shape, self.written_dtype) for _ in range(int(self.num_outputs))]
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        stream(machine, given, made, chunk, MAPS[self.formula].run)
        return {f"y{i}": array.values for i, array in enumerate(made)}


def sigmoid_mul(num_elements: Num, dtype: DType = BF16, out: DType | None = None) -> CellMap:
    """y = sigmoid(gate) x; inputs gate, x.

    >>> sigmoid_mul(1000).work(2**16).special_ops
    2000
    """
    return _named(SIGMOID_MUL, num_elements, dtype, out)


def quasi_gates(num_elements: Num, dtype: DType = BF16, out: DType | None = None) -> CellMap:
    """Decay and drive of a quasi-LSTM; inputs: forget, input and cell pre-activations.

    >>> quasi_gates(1000).work(2**16).bytes  # 3 read, 2 written, 2 B each
    10000.0
    """
    return _named(QUASI_GATES, num_elements, dtype, out)


def cell_output(num_elements: Num, dtype: DType = BF16, out: DType | None = None) -> CellMap:
    """What an LSTM shows of its cell; inputs: the output gate's pre-activation, c.

    >>> cell_output(1000).work(2**16).special_ops
    3000
    """
    return _named(CELL_OUTPUT, num_elements, dtype, out)


def lstm_cell(num_elements: Num, dtype: DType = BF16, out: DType | None = None) -> CellMap:
    """One step of an LSTM; inputs: pre-activations f, i, z, o of the input, of the state, and c.

    >>> lstm_cell(1000).work(2**16).vector_flops
    12000
    """
    return _named(LSTM_CELL, num_elements, dtype, out)


def _named(formula: str, num_elements: Num, dtype: DType, out: DType | None) -> CellMap:
    return CellMap(num_elements=num_elements, formula=formula, dtype=dtype, out_dtype=out)


def _stated(formula: Formula) -> dict[str, int]:
    return {
        "num_inputs": formula.num_inputs,
        "num_outputs": formula.num_outputs,
        "vector_flops_per_element": formula.vector_flops,
        "special_ops_per_element": formula.special_ops,
    }


def _sigmoid(x: Lanes) -> Lanes:
    return (1 + (-x).exp()).reciprocal()


def _sigmoid_mul(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    return (_sigmoid(x[0]) * x[1],)


def _cell_output(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    return (_sigmoid(x[0]) * x[1].tanh(),)


def _quasi_gates(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    return _sigmoid(x[0] + FORGET_BIAS), _sigmoid(x[1]) * x[2].tanh()


def _lstm_cell(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    f, i, z, o = (a + b for a, b in zip(x[:4], x[4:8], strict=True))
    c = _sigmoid(f + FORGET_BIAS) * x[8] + _sigmoid(i) * z.tanh()
    return c, _sigmoid(o) * c.tanh()


def _naive_sigmoid(x: Values) -> Values:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


def _naive_lstm_cell(x: Sequence[Values]) -> tuple[Values, ...]:
    f, i, z, o = (a + b for a, b in zip(x[:4], x[4:8], strict=True))
    c = _naive_sigmoid(f + FORGET_BIAS) * x[8] + _naive_sigmoid(i) * np.tanh(z)
    return c, _naive_sigmoid(o) * np.tanh(c)


MAPS: Final[Mapping[str, Formula]] = {
    SIGMOID_MUL: Formula(
        num_inputs=2, vector_flops=2, special_ops=2, run=_sigmoid_mul,
        naive=lambda x: (_naive_sigmoid(x[0]) * x[1],),
    ),
    CELL_OUTPUT: Formula(
        num_inputs=2, vector_flops=2, special_ops=3, run=_cell_output,
        naive=lambda x: (_naive_sigmoid(x[0]) * np.tanh(x[1]),),
    ),
    QUASI_GATES: Formula(
        num_inputs=3, num_outputs=2, vector_flops=4, special_ops=5, run=_quasi_gates,
        naive=lambda x: (
            _naive_sigmoid(x[0] + FORGET_BIAS), _naive_sigmoid(x[1]) * np.tanh(x[2])
        ),
    ),
    LSTM_CELL: Formula(
        num_inputs=9, num_outputs=2, vector_flops=12, special_ops=8, run=_lstm_cell,
        naive=_naive_lstm_cell,
    ),
}  # fmt: skip
"""The named maps of `CellMap`."""

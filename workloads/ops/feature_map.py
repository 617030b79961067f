"""Feature maps of linear attention: rows x[d] to rows phi(x)[w], one kernel over blocks of rows.

    elu       max(x, 0) + exp(min(x, 0))                 w = d       arXiv 2006.16236, eq. 7
    relu      max(x, 0) + 1e-6                           w = d       Kasai et al. 2021 (T2R)
    taylor    [1, x / d^(1/4), x x^T / sqrt(2 d)]        w = 1 + d + d^2, so that phi(q) . phi(k) =
              1 + s + s^2 / 2 with s = q . k / sqrt(d)               arXiv 2402.18668 (Based)
    exp       [exp(x), exp(-x)]                          w = 2 d     arXiv 2402.04347, section 4.2
    hedgehog  softmax([x, -x])                           w = 2 d     the same, as its authors run it

x is what a learned map gives where the paper has one (`LEARNED`); that product is a stage of its
own. With m the largest |x| of a row, `hedgehog` is exp(x - m) and exp(-x - m) over their sum: no
exponent is positive. Counts a row:

    vector   elu 3 d;  relu 2 d;  taylor 2 d + d^2;  exp 0;  hedgehog 7 d + 1
    special  elu d;    relu 0;    taylor 0;          exp 2 d;  hedgehog 2 d + 1
    bytes    (d + w) e

The 1e-6 of `relu` keeps normalisers above zero (there it is usually added to the normaliser).
Ignored: nothing; negation is an operand modifier and free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import UnknownNameError
from workloads.machine import Machine, Values, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import Elementwise
from workloads.ops.streamed import Lanes
from workloads.work import Work

ELU, RELU, TAYLOR, EXP, HEDGEHOG = "elu", "relu", "taylor", "exp", "hedgehog"
LEARNED: Final = frozenset({RELU, EXP, HEDGEHOG})
"""Maps that stand behind a learned product of each head."""
RELU_FLOOR: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Feature:
    """A map: outputs, vector flops and special functions of a row of d, the map and its truth."""

    width: Callable[[Num], Num]
    vector: Callable[[Num], Num]
    special: Callable[[Num], Num]
    run: Callable[[Lanes], list[Lanes]]
    naive: Callable[[Values], Values]


def _clipped(x: Lanes, low: float, high: float) -> Lanes:
    """One comparison an element."""
    x.machine.count(vector=x.values.size)
    return Lanes(x.machine, np.clip(x.values, low, high))


def _elu(x: Lanes) -> list[Lanes]:
    return [_clipped(x, 0, np.inf) + _clipped(x, -np.inf, 0).exp()]


def _relu(x: Lanes) -> list[Lanes]:
    return [_clipped(x, 0, np.inf) + RELU_FLOOR]


def _taylor(x: Lanes) -> list[Lanes]:
    y = x * x.values.shape[-1] ** -0.25
    left = y * 0.5**0.5
    rows = x.values.shape[0]
    pairs = Lanes(x.machine, left.values[:, :, None]) * Lanes(x.machine, y.values[:, None])
    return [
        Lanes(x.machine, np.ones((rows, 1))),
        y,
        Lanes(x.machine, pairs.values.reshape(rows, -1)),
    ]


def _exp(x: Lanes) -> list[Lanes]:
    return [x.exp(), (-x).exp()]


def _hedgehog(x: Lanes) -> list[Lanes]:
    x.machine.count(vector=x.values.size)
    top = Lanes(x.machine, np.abs(x.values).max(axis=-1, keepdims=True))
    halves = [(x - top).exp(), (-x - top).exp()]
    inverse = (halves[0].sum(-1) + halves[1].sum(-1)).reciprocal()
    return [half * inverse for half in halves]


def _naive_taylor(x: Values) -> Values:
    y = x / x.shape[-1] ** 0.25
    pairs = np.einsum("ri,rj->rij", y, y).reshape(len(x), -1) / 2**0.5
    return np.concatenate([np.ones((len(x), 1)), y, pairs], axis=1)


def _naive_hedgehog(x: Values) -> Values:
    both = np.exp(np.concatenate([x, -x], axis=1))
    found: Values = both / both.sum(axis=1, keepdims=True)
    return found


FEATURES: Final[Mapping[str, Feature]] = {
    ELU: Feature(
        lambda d: d, lambda d: 3 * d, lambda d: d, _elu,
        lambda x: np.where(x > 0, x + 1, np.exp(x)),
    ),
    RELU: Feature(
        lambda d: d, lambda d: 2 * d, lambda d: 0 * d, _relu,
        lambda x: np.where(x > 0, x, 0) + RELU_FLOOR,
    ),
    TAYLOR: Feature(
        lambda d: 1 + d + d * d, lambda d: 2 * d + d * d, lambda d: 0 * d, _taylor, _naive_taylor
    ),
    EXP: Feature(
        lambda d: 2 * d, lambda d: 0 * d, lambda d: 2 * d, _exp,
        lambda x: np.exp(np.concatenate([x, -x], axis=1)),
    ),
    HEDGEHOG: Feature(
        lambda d: 2 * d, lambda d: 7 * d + 1, lambda d: 2 * d + 1, _hedgehog, _naive_hedgehog
    ),
}  # fmt: skip
"""The maps by name."""


@dataclass(frozen=True, kw_only=True)
class KernelFeatures(ProvedOp):
    """phi(x) of x[rows, dim], a map of the module's table.

    >>> op = KernelFeatures(rows=10, dim=64, feature="hedgehog")
    >>> op.width, op.work(2**16).bytes == 2 * 10 * (64 + 128)
    (128, True)
    """

    name: ClassVar[str] = "kernel_features"
    rows: Num
    dim: Num
    feature: str = ELU
    dtype: DType = BF16

    def check(self) -> None:
        """A known map."""
        if self.feature not in FEATURES:
            raise UnknownNameError("feature", self.feature, list(FEATURES))

    @property
    def width(self) -> Num:
        """Features of a row."""
        return FEATURES[self.feature].width(self.dim)

    def row_bytes(self) -> Num:
        """A row in and its features out."""
        return (self.dim + self.width) * self.dtype.bytes_per_element

    def stages(self) -> tuple[Stage, ...]:
        """A pointwise kernel with several outputs an element, rounded up for `taylor`."""
        kind = FEATURES[self.feature]
        one = Elementwise(
            num_elements=self.rows * self.dim, num_outputs=ceil_div(self.width, self.dim),
            vector_flops_per_element=kind.vector(self.dim) / self.dim,
            special_ops_per_element=kind.special(self.dim) / self.dim, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("features", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Rows held at a time."""
        require_fit(self.name, fast_bytes, self.row_bytes(), "one row and its features")
        return {"rows": minimum(self.rows, floor(fast_bytes / self.row_bytes()))}

    def work(self, fast_bytes: Num) -> Work:
        """The module's table; in once, out once."""
        self.tiling(fast_bytes)
        kind, e = FEATURES[self.feature], self.dtype.bytes_per_element
        return Work(
            vector_flops=self.rows * kind.vector(self.dim),
            special_ops=self.rows * kind.special(self.dim),
            read_bytes=self.rows * self.dim * e,
            write_bytes=self.rows * self.width * e,
        )

    def compulsory_bytes(self) -> Num:
        """In once, out once."""
        return self.rows * self.row_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x[rows, dim]."""
        return {"x": rng.standard_normal((int(self.rows), int(self.dim)))}

    def reference(self, inputs: Arrays) -> Arrays:
        """The map as the module writes it."""
        return {"y": FEATURES[self.feature].naive(inputs["x"])}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel over blocks of rows."""
        x = machine.place(inputs["x"], self.dtype)
        y = machine.empty((len(inputs["x"]), int(self.width)), self.dtype)
        with machine.kernel():
            for rows in slices(int(self.rows), int(self.tiling(machine.fast_bytes)["rows"])):
                with machine.scope():
                    parts = FEATURES[self.feature].run(Lanes(machine, machine.load(x, rows).values))
                    found = np.concatenate([part.values for part in parts], axis=1)
                    machine.store(Lanes(machine, found).keep(self.dtype), y, rows)
        return {"y": y.values}

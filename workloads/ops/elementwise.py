"""Pointwise maps: n elements from some arrays to others, streamed once through fast memory.

    reads  n num_inputs e_in,   writes  n num_outputs e_out,   n flops_per_element flops

Nothing is used twice, so the traffic is compulsory whatever the fast memory. The named maps
(`silu_mul`, `gelu`, `adam_step`, ...) are really computed by their programs, each arithmetic
operation counting itself; a map without a name is a stand-in with the declared number of steps:
its bytes are counted exactly and its flops are what the caller declared.

Conventions: negation is an operand modifier and free; a change of format is free; a scalar
derived once per launch (a learning rate) is free; temporaries of one element live in registers
and take no fast memory. Rotary embedding and Adam mix formats and have classes of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.machine import Machine, Values
from workloads.numeric import Array, Num, any_true
from workloads.op import Arrays
from workloads.ops.adam import AdamStep
from workloads.ops.rope import Rope
from workloads.ops.streamed import Lanes, Map, StreamedOp, set_non_negative, stream

GENERIC: Final = "generic"

NaiveMap: TypeAlias = Callable[[Sequence[Values]], tuple[Values, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """A named map: arrays in and out, operations per element, the map itself and its truth."""

    num_inputs: int
    num_outputs: int = 1
    vector_flops: int
    special_ops: int
    run: Map
    naive: NaiveMap


@dataclass(frozen=True, kw_only=True)
class Elementwise(StreamedOp):
    """`num_outputs` arrays of `num_elements` from `num_inputs` arrays, element by element.

    `vector_flops_per_element` and `special_ops_per_element` may be zero or fractional (averages;
    the program takes whole numbers only), `num_inputs` zero (a fill). Inputs are stored in
    `dtype`, outputs in `out_dtype` or else `dtype`. `formula` names one of `FORMULAS`, whose
    counts the fields must then state; the helpers below fill them in.

    >>> Elementwise(num_elements=10**6, num_inputs=2).work(2**16).bytes  # (2 + 1) 2 B
    6000000.0
    """

    name: ClassVar[str] = "elementwise"
    num_elements: Num
    num_inputs: float | Array = 1
    num_outputs: Num = 1
    vector_flops_per_element: float | Array = 1
    special_ops_per_element: float | Array = 0
    dtype: DType = BF16
    out_dtype: DType | None = None
    formula: str = GENERIC

    def check(self) -> None:
        """Counts per element must not be negative and must be those of the named formula."""
        set_non_negative(self, "num_inputs", whole=True)
        set_non_negative(self, "vector_flops_per_element")
        set_non_negative(self, "special_ops_per_element")
        if self.formula == GENERIC:
            return
        if self.formula not in FORMULAS:
            raise UnknownNameError("formula", self.formula, [GENERIC, *FORMULAS])
        for field, stated in _stated(FORMULAS[self.formula]).items():
            if any_true(np.not_equal(getattr(self, field), stated)):
                raise InputError(
                    f"{self.name}: {self.formula} has {field} = {stated}, "
                    f"not {getattr(self, field)}; leave formula as '{GENERIC}' to declare your own"
                )

    @property
    def written_dtype(self) -> DType:
        """Format of the outputs: `out_dtype`, else the input format."""
        return self.out_dtype or self.dtype

    def elements(self) -> Num:
        """Length of every array."""
        return self.num_elements

    def read_bytes(self) -> Num:
        """Inputs per element, in `dtype`."""
        return self.num_inputs * self.dtype.bytes_per_element

    def write_bytes(self) -> Num:
        """Outputs per element, in `out_dtype` or else `dtype`."""
        return self.num_outputs * self.written_dtype.bytes_per_element

    def steps(self) -> tuple[Num, Num]:
        """As the fields state."""
        return self.vector_flops_per_element, self.special_ops_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x0, x1, ... of [num_elements]."""
        n = int(self.num_elements)
        return {f"x{i}": rng.standard_normal(n) for i in range(int(self.num_inputs))}

    def reference(self, inputs: Arrays) -> Arrays:
        """y0, y1, ...: the formula's truth, or the stand-in in closed form."""
        sources = [inputs[f"x{i}"] for i in range(int(self.num_inputs))]
        if self.formula == GENERIC:
            outputs = self._stand_in_truth(sources)
        else:
            outputs = FORMULAS[self.formula].naive(sources)
        return {f"y{i}": y for i, y in enumerate(outputs)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Chunk after chunk in one kernel."""
        sources = [machine.place(inputs[f"x{i}"], self.dtype) for i in range(int(self.num_inputs))]
        n, num_outputs = int(self.num_elements), int(self.num_outputs)
        targets = [machine.empty((n,), self.written_dtype) for _ in range(num_outputs)]
        run = self._stand_in if self.formula == GENERIC else FORMULAS[self.formula].run
        stream(machine, sources, targets, int(self.tiling(machine.fast_bytes)["chunk"]), run)
        return {f"y{i}": target.values for i, target in enumerate(targets)}

    def _whole_steps(self) -> tuple[int, int]:
        """Additions and special functions per element of the stand-in."""
        steps = []
        for name in ("vector_flops_per_element", "special_ops_per_element"):
            value = getattr(self, name)
            if value != int(value):
                raise InputError(f"{self.name}: a program needs a whole {name}, not {value}")
            steps.append(int(value))
        return steps[0], steps[1]

    def _stand_in(self, x: Sequence[Lanes]) -> tuple[Lanes, ...]:
        """The declared additions, cycling through the inputs, then the declared tanhs."""
        additions, tanhs = self._whole_steps()
        y = x[0]
        for i in range(additions):
            y = y + x[(i + 1) % len(x)]
        for _ in range(tanhs):
            y = y.tanh()
        return (y,) * int(self.num_outputs)

    def _stand_in_truth(self, x: Sequence[Values]) -> tuple[Values, ...]:
        additions, tanhs = self._whole_steps()
        terms = x or [np.ones(int(self.num_elements))]
        turns = (np.arange(additions + 1) % len(terms)).tolist()
        y = sum((turns.count(i) * term for i, term in enumerate(terms)), start=0.0 * terms[0])
        for _ in range(tanhs):
            y = np.tanh(y)
        return (y,) * int(self.num_outputs)


# ---- named maps ----------------------------------------------------------------------------


def silu_mul(num_elements: Num, dtype: DType = BF16) -> Elementwise:
    """SwiGLU's gate y = g sigmoid(g) u (Shazeer 2020, arXiv 2002.05202); inputs g, u.

    >>> silu_mul(4096 * 14336).work(2**16).bytes == 3 * 2 * 4096 * 14336
    True
    """
    return _named("silu_mul", num_elements, dtype)


def silu_mul_backward(num_elements: Num, dtype: DType = BF16) -> Elementwise:
    """Gradients dg, du of `silu_mul` from g, u, dy; the sigmoid is computed again.

    dg = dy u (s + g s (1 - s)), du = dy g s, with s = sigmoid(g).

    >>> silu_mul_backward(1000).work(2**16).bytes  # 3 read, 2 written, 2 B each
    10000.0
    """
    return _named("silu_mul_backward", num_elements, dtype)


def gelu(num_elements: Num, dtype: DType = BF16) -> Elementwise:
    """GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2).

    y = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    >>> gelu(1000).work(2**16).vector_flops
    7000
    """
    return _named("gelu", num_elements, dtype)


def gelu_backward(num_elements: Num, dtype: DType = BF16) -> Elementwise:
    """Gradient dx of `gelu` from x, dy; the tanh is computed again.

    >>> gelu_backward(1000).work(2**16).bytes  # 2 read, 1 written, 2 B each
    6000.0
    """
    return _named("gelu_backward", num_elements, dtype)


def add(num_elements: Num, dtype: DType = BF16) -> Elementwise:
    """y = a + b.

    >>> add(1000).work(2**16).vector_flops
    1000
    """
    return _named("add", num_elements, dtype)


def mul(num_elements: Num, dtype: DType = BF16) -> Elementwise:
    """y = a b: a gate as a kernel of its own.

    >>> mul(1000).work(2**16).vector_flops
    1000
    """
    return _named("mul", num_elements, dtype)


def residual_add(num_elements: Num, dtype: DType = BF16) -> Elementwise:
    """The residual stream's h + f(h) as a kernel of its own, not fused into its neighbours.

    >>> residual_add(1000) == add(1000)
    True
    """
    return add(num_elements, dtype)


def cast(num_elements: Num, dtype: DType, out_dtype: DType) -> Elementwise:
    """A copy in another format; conversion instructions are not counted.

    >>> cast(1000, DType("fp32", 32, "fp32"), BF16).work(2**16).bytes
    6000.0
    """
    return dataclasses.replace(_named("cast", num_elements, dtype), out_dtype=out_dtype)


def rope(num_tokens: Num, num_heads: Num, head_dim: Num, dtype: DType = BF16) -> Rope:
    """Rotary position embedding of one tensor of heads; see `Rope`.

    >>> rope(1000, 32, 128).work(2**16).vector_flops == 3 * 1000 * 32 * 128
    True
    """
    return Rope(num_tokens=num_tokens, num_heads=num_heads, head_dim=head_dim, dtype=dtype)


def adam_step(
    num_parameters: Num,
    grad_bytes: Num = 2,
    weight_bytes: float | Array = 2,
    moment_bytes: Num = 4,
) -> AdamStep:
    """One optimizer step over that many parameters; see `AdamStep`.

    >>> adam_step(8_000_000_000).work(2**20).bytes == 28 * 8e9
    True
    """
    return AdamStep(
        num_parameters=num_parameters,
        grad_bytes=grad_bytes,
        weight_bytes=weight_bytes,
        moment_bytes=moment_bytes,
    )


# ---- formulas ------------------------------------------------------------------------------

_GELU_C, _GELU_A = float(np.sqrt(2 / np.pi)), 0.044715


def _sigmoid(g: Lanes) -> Lanes:
    return (1 + (-g).exp()).reciprocal()


def _silu_mul(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    g, u = x
    return (g * _sigmoid(g) * u,)


def _silu_mul_backward(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    g, u, dy = x
    s = _sigmoid(g)
    silu = g * s
    return dy * u * (s + silu * (1 - s)), dy * silu


def _gelu_tanh(x: Lanes, squared: Lanes) -> Lanes:
    return (x * (_GELU_C + squared * (_GELU_C * _GELU_A))).tanh()


def _gelu(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    (z,) = x
    return (z * 0.5 * (1 + _gelu_tanh(z, z * z)),)


def _gelu_backward(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    z, dy = x
    squared = z * z
    t = _gelu_tanh(z, squared)
    slope = _GELU_C + squared * (3 * _GELU_C * _GELU_A)
    return (dy * 0.5 * (1 + t + z * (1 - t * t) * slope),)


def _naive_silu_mul(x: Sequence[Values]) -> tuple[Values, ...]:
    return (x[0] / (1 + np.exp(-x[0])) * x[1],)


def _naive_gelu(x: Sequence[Values]) -> tuple[Values, ...]:
    inner = np.sqrt(2 / np.pi) * (x[0] + 0.044715 * x[0] ** 3)
    return (x[0] / 2 * (1 + np.tanh(inner)),)


def _differentiated(forward: NaiveMap) -> NaiveMap:
    """Gradients of a one-output map by a complex step, exact to rounding (Squire, Trapp 1998)."""

    def backward(x: Sequence[Values]) -> tuple[Values, ...]:
        *points, dy = x
        step = 1e-30
        slopes = []
        for i in range(len(points)):
            moved = [p + 1j * step * (i == j) for j, p in enumerate(points)]
            slopes.append(forward(moved)[0].imag / step)
        return tuple(dy * slope for slope in slopes)

    return backward


FORMULAS: Final[Mapping[str, Formula]] = {
    "silu_mul": Formula(
        num_inputs=2, vector_flops=3, special_ops=2, run=_silu_mul, naive=_naive_silu_mul
    ),
    "silu_mul_backward": Formula(
        num_inputs=3,
        num_outputs=2,
        vector_flops=8,
        special_ops=2,
        run=_silu_mul_backward,
        naive=_differentiated(_naive_silu_mul),
    ),
    "gelu": Formula(num_inputs=1, vector_flops=7, special_ops=1, run=_gelu, naive=_naive_gelu),
    "gelu_backward": Formula(
        num_inputs=2,
        vector_flops=14,
        special_ops=1,
        run=_gelu_backward,
        naive=_differentiated(_naive_gelu),
    ),
    "add": Formula(
        num_inputs=2,
        vector_flops=1,
        special_ops=0,
        run=lambda x: (x[0] + x[1],),
        naive=lambda x: (x[0] + x[1],),
    ),
    "mul": Formula(
        num_inputs=2,
        vector_flops=1,
        special_ops=0,
        run=lambda x: (x[0] * x[1],),
        naive=lambda x: (x[0] * x[1],),
    ),
    "cast": Formula(
        num_inputs=1,
        vector_flops=0,
        special_ops=0,
        run=lambda x: (x[0],),
        naive=lambda x: (x[0],),
    ),
}
"""The named maps of `Elementwise`."""


def _named(formula: str, num_elements: Num, dtype: DType) -> Elementwise:
    """The op of a named formula, its counts filled in."""
    stated = FORMULAS[formula]
    return Elementwise(
        num_elements=num_elements,
        num_inputs=stated.num_inputs,
        num_outputs=stated.num_outputs,
        vector_flops_per_element=stated.vector_flops,
        special_ops_per_element=stated.special_ops,
        dtype=dtype,
        formula=formula,
    )


def _stated(formula: Formula) -> dict[str, int]:
    """A formula's counts under the names of the fields that state them."""
    return {
        "num_inputs": formula.num_inputs,
        "num_outputs": formula.num_outputs,
        "vector_flops_per_element": formula.vector_flops,
        "special_ops_per_element": formula.special_ops,
    }

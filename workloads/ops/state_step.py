"""One step of many linear state spaces: the held states are read, moved on, read out and written.

    x' = A x + B u,   y = C x' + D u          for every sequence and channel

by vector lanes, x of N real numbers (N/2 complex ones for `low_rank`, one of a conjugate pair).
Flops of a channel of one sequence, and fp32 numbers of its parameters:

    low_rank    18 N + 2    7 N + 1     Lambda - P Q*, discretised    (S4, arXiv 2111.00396, C.2)
    companion    6 N + 2    3 N + 1     a shift and a column          (SpaceTime, arXiv 2303.09489)

Both are O(N); a dense A is a product of matrices (`state_space_layer`). Ignored: nothing; states go
to slow memory and back once a step, parameters are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.machine import Machine, SlowArray, Tile, Values
from workloads.numeric import Num, any_true, ceil_div
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.complex_lanes import ComplexLanes
from workloads.ops.elementwise import Elementwise
from workloads.ops.state_spaces import (
    COMPANION,
    LOW_RANK,
    complex_vectors,
    dense_form,
    prepared,
    random_system,
    real_parts,
    step_numbers,
)
from workloads.ops.streamed import Lanes
from workloads.work import Work

FP32_BYTES: Final = FP32.bits // 8
SKIP_FLOPS: Final = 2
"""D u, added."""


def _low_rank(fixed: Mapping[str, Lanes], held: Values, u: Lanes) -> tuple[Values, Lanes]:
    """`prepared`'s equations; x is N/2 real parts, then as many imaginary ones."""
    mc = u.machine
    g, p, q, b, d, e, c = (ComplexLanes.of(mc, v) for v in complex_vectors(fixed["p"].values))
    x = ComplexLanes.of(mc, complex_vectors(held.reshape(2, -1)))
    v = g.times(x).minus(p.scaled(q.real_part(x).sum(0))).plus(b.scaled(u))
    w = d.times(v)
    moved = w.minus(e.scaled(q.real_part(w).sum(0)))
    y = c.real_part(moved).sum(0)
    return real_parts(moved.values).reshape(-1), Lanes(mc, y.values[0])


def _companion(fixed: Mapping[str, Lanes], held: Values, u: Lanes) -> tuple[Values, Lanes]:
    """The shift is addressing."""
    shifted = np.concatenate([[0.0], held[:-1]])
    moved = fixed["a"] * Lanes(u.machine, held[-1]) + Lanes(u.machine, shifted) + fixed["b"] * u
    return moved.values, Lanes(u.machine, (fixed["c"] * moved).sum(0).values[0])


StepForm: TypeAlias = Callable[[Mapping[str, Lanes], Values, Lanes], tuple[Values, Lanes]]
"""From a channel's parameters, its state and input to the next state and C x'."""
KINDS: Final[Mapping[str, StepForm]] = {LOW_RANK: _low_rank, COMPANION: _companion}
"""How structures step."""


@dataclass(frozen=True, kw_only=True)
class StateStep(ProvedOp):
    """u, y[batch, channels]; states x[batch, channels, state_dim] in fp32.

    >>> op = StateStep(batch=8, channels=512, state_dim=64)
    >>> op.state_bytes() == 8 * 512 * 64 * 4, op.work(2**16).vector_flops == 8 * 512 * (18 * 64 + 2)
    (True, True)
    """

    name: ClassVar[str] = "state_step"
    batch: Num = 1
    channels: Num
    state_dim: Num
    structure: str = LOW_RANK
    dtype: DType = FP32

    def check(self) -> None:
        """A structure that has a kernel; pairs of complex states."""
        if self.structure not in KINDS:
            raise UnknownNameError("structure", self.structure, list(KINDS))
        if self.structure == LOW_RANK and any_true(self.state_dim % 2 != 0):
            raise InputError(
                f"{self.name}: state_dim = {self.state_dim} must be even, complex states come in "
                "pairs; take one more"
            )

    def state_bytes(self) -> Num:
        """One copy of all states."""
        return self.batch * self.channels * self.state_dim * FP32_BYTES

    def parameter_bytes(self) -> Num:
        """Of all channels, D included."""
        return self.channels * (step_numbers(self.structure, self.state_dim) + 1) * FP32_BYTES

    def flops(self) -> Num:
        """Of a channel of one sequence."""
        n = self.state_dim
        if self.structure == LOW_RANK:
            return 18 * n + SKIP_FLOPS
        return 6 * n + SKIP_FLOPS

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a pointwise fp32 kernel that reads and writes as many bytes."""
        return (Stage("step", as_stream(self.work(float(2**52)))),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """A channel at a time: its parameters beside one state and what the state moves to."""
        n = self.state_dim
        held = (step_numbers(self.structure, n) + 1 + 2 * n) * FP32_BYTES
        held = held + 2 * self.dtype.bytes_per_element
        require_fit(
            self.name, fast_bytes, held, "a channel's system and state",
            "make state_dim smaller, or use products of matrices",
        )  # fmt: skip
        return {"channels": 1}

    def work(self, fast_bytes: Num) -> Work:
        """The module's table."""
        self.tiling(fast_bytes)
        tokens = self.batch * self.channels * self.dtype.bytes_per_element
        return Work(
            vector_flops=self.batch * self.channels * self.flops(),
            read_bytes=tokens + self.state_bytes() + self.parameter_bytes(),
            write_bytes=tokens + self.state_bytes(),
        )

    def compulsory_bytes(self) -> Num:
        """The token in and out, states read and written, parameters."""
        return self.work(float(2**52)).bytes

    def min_flops(self) -> Mapping[DType, Num]:
        """No products of matrices."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """u, x, d and the parameters of `state_spaces`."""
        batch, channels, n = int(self.batch), int(self.channels), int(self.state_dim)
        system = random_system(self.structure, rng, channels, n)
        return {
            "u": rng.standard_normal((batch, channels)),
            "x": rng.standard_normal((batch, channels, n)),
            "d": rng.standard_normal(channels),
            **system,
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """With plain matrices."""
        found = dense_form(self.structure, inputs)
        x = inputs["x"]
        if self.structure == LOW_RANK:
            half = complex_vectors(x.reshape(*x.shape[:2], 2, -1))
            x = np.concatenate([half, half.conj()], axis=-1)
        moved = np.einsum("hij,bhj->bhi", found.a, x) + found.b * inputs["u"][:, :, None]
        y = np.real((found.c * moved).sum(axis=-1)) + inputs["d"] * inputs["u"]
        if self.structure == LOW_RANK:
            moved = real_parts(moved[..., : x.shape[-1] // 2]).reshape(inputs["x"].shape)
        return {"y": y, "x": np.real(moved)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: a channel's parameters stay, its states of all sequences pass."""
        a = {
            name: machine.place(values.copy(), FP32)
            for name, values in prepared(self.structure, inputs).items()
        }
        a |= {name: machine.place(inputs[name].copy(), FP32) for name in ("x", "d")}
        a["u"] = machine.place(inputs["u"], self.dtype)
        a["y"] = machine.empty(inputs["u"].shape, self.dtype)
        step = KINDS[self.structure]
        names = [name for name in a if name not in ("x", "u", "y")]
        with machine.kernel():
            for channel in range(int(self.channels)):
                with machine.scope():
                    fixed = {name: machine.load(a[name], channel) for name in names}
                    for row in range(int(self.batch)):
                        with machine.scope():
                            self._row(machine, a, fixed, (row, channel), step)
        return {"y": a["y"].values, "x": a["x"].values}

    def _row(
        self,
        mc: Machine,
        a: Mapping[str, SlowArray],
        fixed: Mapping[str, Tile],
        at: tuple[int, int],
        step: StepForm,
    ) -> None:
        """A channel of one sequence."""
        held, u = mc.load(a["x"], at), Lanes(mc, mc.load(a["u"], at).values)
        moved, y = step({name: Lanes(mc, t.values) for name, t in fixed.items()}, held.values, u)
        mc.store(mc.vector(moved, per_element=0, into=held), a["x"], at)
        y = y + Lanes(mc, fixed["d"].values) * u
        mc.store(y.keep(self.dtype), a["y"], at)


def as_stream(work: Work) -> Elementwise:
    """A pointwise fp32 kernel of the same bytes, flops and special functions."""
    elements = ceil_div(work.bytes, 2 * FP32_BYTES)
    return Elementwise(
        num_elements=elements, vector_flops_per_element=work.vector_flops / elements,
        special_ops_per_element=work.special_ops / elements, dtype=FP32,
    )  # fmt: skip

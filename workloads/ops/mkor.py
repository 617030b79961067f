"""MKOR: inverses of Kronecker factors kept current by rank-1 updates (arXiv 2306.01685).

A layer with weights [d_out, d_in] has the gradient G and, averaged over the batch, the vectors g
(gradients of its outputs) and a (its inputs). For each factor, J its inverse and v its vector,

    u = J v,   s = v^T u,   J <- gamma J + (1 - gamma) / (gamma^2 (1 + gamma (1 - gamma) s)) u u^T

(algorithm 1, as printed), and the step is L^-1 G R^-1. A factor of d takes 2 d^2 flops on products
with one column and 3 d^2 on the update, where KFAC inverts in O(d^3); a rank sends d elements of it
where KFAC sends d^2. The two products around G are those of KFAC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, slices
from workloads.numeric import Num, ceil_div, floor, minimum, sqrt
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.matmul import Matmul
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.streamed import Lanes
from workloads.work import Work

GAMMA: Final = 0.9
"""Momentum of the factors that the program runs with; counts do not depend on it."""
SCALAR_FLOPS: Final = 4


@dataclass(frozen=True, kw_only=True)
class RankOneUpdate(ProvedOp):
    """J <- gamma J + c u u^T of [dim, dim] in square tiles, c from s as above.

    Reads J, u (fp32) once for rows and once a tile row for columns, and s; writes J. 3 flops an
    element, dim to scale u, 4 and a reciprocal for c.

    >>> RankOneUpdate(dim=1024).work(2**20).vector_flops == 3 * 1024**2 + 1024 + 4
    True
    """

    name: ClassVar[str] = "rank_one_update"
    dim: Num
    dtype: DType = BF16

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """The largest `tile` with e t^2 + 8 t + 8 <= fast: J, both parts of u, s and c."""
        e = self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, e + 16, "a 1 x 1 tile, its vectors and c")
        side = floor((sqrt(16 + e * (fast_bytes - 8)) - 4) / e)
        return {"tile": minimum(self.dim, side)}

    def work(self, fast_bytes: Num) -> Work:
        """One kernel."""
        e, d = self.dtype.bytes_per_element, self.dim
        num_tiles = ceil_div(d, self.tiling(fast_bytes)["tile"])
        vectors = FP32.bytes_per_element * (d + d * num_tiles + 1)
        return Work(
            vector_flops=3 * d * d + d + SCALAR_FLOPS,
            special_ops=1,
            read_bytes=e * d * d + vectors,
            write_bytes=e * d * d,
            launches=1,
        )

    def compulsory_bytes(self) -> Num:
        """J in and out, u and s."""
        e = self.dtype.bytes_per_element
        return 2 * e * self.dim * self.dim + FP32.bytes_per_element * (self.dim + 1)

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """j [dim, dim] positive definite, u [dim], s [1]."""
        d = int(self.dim)
        root = rng.standard_normal((d, d))
        v = rng.standard_normal(d)
        j = root @ root.T / d + np.eye(d)
        return {"j": j, "u": j @ v, "s": np.array([v @ j @ v])}

    def reference(self, inputs: Arrays) -> Arrays:
        """The formula."""
        u, s = inputs["u"], float(inputs["s"][0])
        c = (1 - GAMMA) / (GAMMA**2 * (1 + GAMMA * (1 - GAMMA) * s))
        return {"j": GAMMA * inputs["j"] + c * np.outer(u, u)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """c once, then tile after tile, in place."""
        d, t = int(self.dim), int(self.tiling(machine.fast_bytes)["tile"])
        j = machine.place(inputs["j"], self.dtype)
        u, s = (machine.place(inputs[name], FP32) for name in ("u", "s"))
        result = machine.empty((d, d), self.dtype)
        with machine.kernel():
            given = Lanes(machine, machine.load(s).values)
            below = (given * (GAMMA * (1 - GAMMA)) + 1) * GAMMA**2
            c = (below.reciprocal() * (1 - GAMMA)).keep(FP32)
            for rows in slices(d, t):
                with machine.scope():
                    part = machine.load(u, rows)
                    left = (Lanes(machine, part.values) * Lanes(machine, c.values)).into(part)
                    for cols in slices(d, t):
                        with machine.scope():
                            right, tile = machine.load(u, cols), machine.load(j, (rows, cols))
                            pairs = np.broadcast_to(right.values, tile.shape)
                            outer = Lanes(machine, pairs) * Lanes(machine, left.values[:, None])
                            new = Lanes(machine, tile.values) * GAMMA + outer
                            machine.store(new.into(tile), result, (rows, cols))
        return {"j": result.values}


@dataclass(frozen=True, kw_only=True)
class MkorStep(SteppedOp):
    """One layer's step: both inverses updated, then the gradient between them.

    >>> op = MkorStep(dim_out=1024, dim_in=1024)
    >>> op.communicated_bytes(), op.state_bytes() == 2 * 2 * 1024**2
    (4096.0, True)
    """

    name: ClassVar[str] = "mkor_step"
    dim_out: Num
    dim_in: Num
    dtype: DType = BF16

    def communicated_bytes(self) -> Num:
        """What a data-parallel rank sends of the factors: both vectors."""
        return (self.dim_out + self.dim_in) * self.dtype.bytes_per_element

    def state_bytes(self) -> Num:
        """Both inverses."""
        return (self.dim_out**2 + self.dim_in**2) * self.dtype.bytes_per_element

    def factor_stages(self, dim: Num, side: str) -> tuple[Stage, Stage, Stage]:
        """u = J v, s = v^T u, the update."""
        return (
            Stage(f"{side}_product", Matmul(m=dim, n=1, k=dim, dtype=self.dtype, out_dtype=FP32)),
            Stage(f"{side}_dot", Matmul(m=1, n=1, k=dim, dtype=FP32)),
            Stage(f"{side}_update", RankOneUpdate(dim=dim, dtype=self.dtype)),
        )

    def left(self) -> Matmul:
        """L^-1 G."""
        return Matmul(m=self.dim_out, n=self.dim_in, k=self.dim_out, dtype=self.dtype)

    def right(self) -> Matmul:
        """(L^-1 G) R^-1."""
        return Matmul(m=self.dim_out, n=self.dim_in, k=self.dim_in, dtype=self.dtype)

    def factor_flops(self) -> Num:
        """Flops of both inverses' updates, with the longest term of each kernel: 5 d^2 a factor."""
        return 5 * (self.dim_out**2 + self.dim_in**2)

    def stages(self) -> tuple[Stage, ...]:
        """Factor by factor, then the gradient."""
        return (
            *self.factor_stages(self.dim_out, "left"),
            *self.factor_stages(self.dim_in, "right"),
            Stage("precondition_left", self.left()),
            Stage("precondition_right", self.right()),
        )

    def compulsory_bytes(self) -> Num:
        """Both inverses and the gradient in and out, both vectors in."""
        e, (m, n) = self.dtype.bytes_per_element, (self.dim_out, self.dim_in)
        return e * (2 * (m * m + n * n + m * n) + m + n)

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """left, right (inverses, positive definite), g, a, and the gradient."""
        m, n = int(self.dim_out), int(self.dim_in)
        made = {}
        for name, d in (("left", m), ("right", n)):
            root = rng.standard_normal((d, d))
            made[name] = root @ root.T / d + np.eye(d)
        gradient = rng.standard_normal((m, n))
        vectors = {"g": rng.standard_normal(m), "a": rng.standard_normal(n)}
        return {**made, **vectors, "gradient": gradient}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """The stages in turn."""
        found = {}
        for side, vector, dim in (("left", "g", self.dim_out), ("right", "a", self.dim_in)):
            product, dot, update = (stage.op for stage in self.factor_stages(dim, side))
            j, v = inputs[side], inputs[vector]
            assert isinstance(product, Matmul) and isinstance(dot, Matmul)
            assert isinstance(update, RankOneUpdate)
            u = step(product, {"a": j[None], "b": v[None, :, None]})["c"][0, :, 0]
            s = step(dot, {"a": v[None, None], "b": u[None, :, None]})["c"][0, 0]
            found[side] = step(update, {"j": j, "u": u, "s": s})["j"]
        g = step(self.left(), {"a": found["left"][None], "b": inputs["gradient"][None]})["c"]
        g = step(self.right(), {"a": g, "b": found["right"][None]})["c"][0]
        return {**found, "gradient": g}

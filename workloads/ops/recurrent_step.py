"""One new token of a linear recurrence: the held state is read, updated, used and written.

Per head, with S[key_dim, value_dim] (dk, dv) and, where normalised, z[key_dim], both in fp32:

    S' = diag(e^g) S + k v^T,   z' = diag(e^g) z + k,   o = S'^T q   (/ q . z')

It is the step that `LinearRecurrence` makes in chunks (Katharopoulos et al. 2020, section 3.4: a
transformer as a recurrent network). By vector lanes: no product of matrices in it. A head counts

    vector   4 dk dv + (decay) dk dv + (normalised) (3 dk + dv + (decay) dk)
    special  (decay) dk + (normalised) 1
    bytes    8 dk dv + (2 dk + 2 dv) e + (decay) 4 dk + (normalised) 8 dk

Ignored: nothing. States are far larger than fast memory together, so each is moved once a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import Elementwise
from workloads.ops.streamed import Lanes
from workloads.work import Work

FP32_BYTES = FP32.bits // 8


@dataclass(frozen=True, kw_only=True)
class RecurrentStep(ProvedOp):
    """q, k[batch, num_heads, key_dim], v and o[..., value_dim]; log decays g are fp32.

    >>> op = RecurrentStep(batch=64, num_heads=32, key_dim=128)
    >>> op.work(2**17).bytes == 64 * 32 * (8 * 128**2 + 4 * 128 * 2)
    True
    """

    name: ClassVar[str] = "recurrent_step"
    batch: Num = 1
    num_heads: Num
    key_dim: Num
    value_dim: Num | None = None
    decay: bool = False
    normalised: bool = False
    dtype: DType = BF16

    @property
    def width_v(self) -> Num:
        """`value_dim`, else `key_dim`."""
        return self.key_dim if self.value_dim is None else self.value_dim

    def state_bytes(self) -> Num:
        """One copy of the states of all heads, normalisers included."""
        elements = self.key_dim * (self.width_v + self.normalised)
        return self.batch * self.num_heads * elements * FP32_BYTES

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a pointwise fp32 kernel that reads and writes as many bytes."""
        work = self.work(float(2**52))
        elements = ceil_div(work.bytes, 2 * FP32_BYTES)
        one = Elementwise(
            num_elements=elements, vector_flops_per_element=work.vector_flops / elements,
            special_ops_per_element=work.special_ops / elements, dtype=FP32,
        )  # fmt: skip
        return (Stage("step", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Columns of the state held beside q, k, the decays and the normaliser."""
        dk, e = self.key_dim, self.dtype.bytes_per_element
        beside = dk * (2 * e + FP32_BYTES * (self.decay + self.normalised))
        column = dk * FP32_BYTES + 2 * e
        require_fit(self.name, fast_bytes, beside + column, "a column of the state")
        return {"width": minimum(self.width_v, floor((fast_bytes - beside) / column))}

    def work(self, fast_bytes: Num) -> Work:
        """The module's equations."""
        self.tiling(fast_bytes)
        dk, dv, e = self.key_dim, self.width_v, self.dtype.bytes_per_element
        heads, decay, normal = self.batch * self.num_heads, int(self.decay), int(self.normalised)
        vector = (4 + decay) * dk * dv + normal * ((3 + decay) * dk + dv)
        gates = decay * dk * FP32_BYTES
        return Work(
            vector_flops=heads * vector,
            special_ops=heads * (decay * dk + normal),
            read_bytes=heads * ((2 * dk + dv) * e + gates) + self.state_bytes(),
            write_bytes=heads * dv * e + self.state_bytes(),
        )

    def compulsory_bytes(self) -> Num:
        """The token's inputs and outputs, the states read and written."""
        return self.work(float(2**52)).bytes

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k (positive where normalised), v, state; decays from near 0 to strong."""
        shape, dk, dv = (int(self.batch), int(self.num_heads)), int(self.key_dim), int(self.width_v)
        found = {name: rng.standard_normal((*shape, dk)) for name in ("q", "k")}
        if self.normalised:
            found = {name: np.abs(x) + 0.1 for name, x in found.items()}
            found["total"] = rng.random((*shape, dk)) + 0.1
        if self.decay:
            found["g"] = -(10 ** rng.uniform(-6, 1.5, (*shape, dk)))
        v, state = rng.standard_normal((*shape, dv)), rng.standard_normal((*shape, dk, dv))
        return found | {"v": v, "state": state}

    def reference(self, inputs: Arrays) -> Arrays:
        """The module's first line, over all heads at once."""
        kept = np.exp(inputs["g"]) if self.decay else np.ones_like(inputs["q"])
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        state = kept[..., None] * inputs["state"] + k[..., None] * v[:, :, None]
        o = np.einsum("bhd,bhde->bhe", q, state)
        if not self.normalised:
            return {"o": o, "state": state}
        total = kept * inputs["total"] + k
        return {"o": o / (q * total).sum(-1, keepdims=True), "state": state, "total": total}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, head after head, columns of the state in blocks."""
        single = {"state", "total", "g"}
        a = {
            name: machine.place(
                x.reshape(-1, *x.shape[2:]).copy(), FP32 if name in single else self.dtype
            )
            for name, x in inputs.items()
        }
        a["o"] = machine.empty(a["v"].values.shape, self.dtype)
        with machine.kernel():
            for head in range(len(a["q"].values)):
                with machine.scope():
                    self._head(machine, a, head)
        kept = ("o", "state", "total") if self.normalised else ("o", "state")
        lead = inputs["q"].shape[:2]
        return {name: a[name].values.reshape(*lead, *a[name].values.shape[1:]) for name in kept}

    def _head(self, mc: Machine, a: Mapping[str, SlowArray], head: int) -> None:
        q, k = (Lanes(mc, mc.load(a[name], head).values[:, None]) for name in ("q", "k"))
        kept = inverse = None
        if self.decay:
            kept = Lanes(mc, mc.load(a["g"], head).values[:, None]).exp()
        if self.normalised:
            held = mc.load(a["total"], head)
            total = _moved_on(Lanes(mc, held.values[:, None]), kept, k)
            mc.store(mc.vector(total.values[:, 0], per_element=0, into=held), a["total"], head)
            inverse = (q * total).sum(0).reciprocal()
        width = int(self.tiling(mc.fast_bytes)["width"])
        for cols in slices(int(self.width_v), width):
            with mc.scope():
                held = mc.load(a["state"], (head, slice(None), cols))
                v = Lanes(mc, mc.load(a["v"], (head, cols)).values[None])
                state = _moved_on(Lanes(mc, held.values), kept, k * v)
                mc.store(state.into(held), a["state"], (head, slice(None), cols))
                o = (state * q).sum(0)
                found: Values = (o if inverse is None else o * inverse).values[0]
                mc.store(Lanes(mc, found).keep(self.dtype), a["o"], (head, cols))


def _moved_on(held: Lanes, kept: Lanes | None, added: Lanes) -> Lanes:
    """A state's decay and addition."""
    return (held if kept is None else held * kept) + added

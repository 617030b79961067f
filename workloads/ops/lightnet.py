"""LightNet: a linear recurrence whose decays add up to a softmax over all keys seen so far.

Qin et al. 2024 (arXiv 2405.21022, "You Only Scan Once"). Each channel of the keys has a running
log-sum-exp z, and the recurrence decays by what z grows:

    z_t = log(e^(z_{t-1}) + e^(k_t))
    S_t = diag(e^(z_{t-1} - z_t)) S_{t-1} + e^(k_t - z_t) v_t^T,      o_t = S_t^T q_t

so that S_t = sum_{j <= t} softmax_j(k) v_j^T: a normaliser that is a prefix sum, where other
recurrences multiply decays. Without an order of the tokens (images, volumes) z is that of all N
tokens and one pass over them is enough, whatever the number of axes:

    softmax of K along N,    S = K^T V    2 N dk dv,    O = Q S    2 N dk dv

4 N d^2 flops a head, against 2 passes an axis (forward and backward, as VMamba's four directions
of an image, arXiv 2401.10166) of a recurrence that multiplies. Each token of the causal form
takes 6 dk vector flops and 3 dk special functions for its gates. Ignored: the activation of Q, the
output gate and normalisation, the multi-dimensional position embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import Elementwise
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.recurrent_attention import RecurrentAttention, recurred
from workloads.ops.softmax import Softmax
from workloads.ops.staged import Step
from workloads.ops.streamed import Lanes
from workloads.work import Work

FP32_BYTES = FP32.bits // 8
GATE_FLOPS, GATE_SPECIAL = 6, 3
"""A log-sum-exp of two (maximum, difference, add, add; exp, log), e^(k - z), the decay."""
SCANS: Final = frozenset({"state", "recur", "scan"})
"""Stages that walk along the sequence with a state."""


@dataclass(frozen=True, kw_only=True)
class AdditiveDecay(ProvedOp):
    """k[streams, len_seq, dim] to weights e^(k_t - z_t) and log decays z_{t-1} - z_t (fp32).

    The first decay of an empty state is stored as 0. `held`: z[streams, dim] goes in and out.

    >>> op = AdditiveDecay(streams=1, len_seq=1000, dim=64)
    >>> op.work(2**16).bytes == 1000 * 64 * (2 + 2 + 4)
    True
    """

    name: ClassVar[str] = "additive_decay"
    streams: Num
    len_seq: Num
    dim: Num
    held: bool = False
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """A pointwise kernel that moves as many bytes."""
        work, e = self.work(float(2**52)), self.dtype.bytes_per_element
        elements = self.streams * self.len_seq * self.dim
        one = Elementwise(
            num_elements=elements, num_inputs=1 + self.held * ceil_div(FP32_BYTES, e),
            num_outputs=1 + ceil_div(FP32_BYTES, e) * (1 + self.held),
            vector_flops_per_element=work.vector_flops / elements,
            special_ops_per_element=work.special_ops / elements, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("gates", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Channels beside their z, and tokens of them, held at a time."""
        token = self.dtype.bytes_per_element + FP32_BYTES
        require_fit(self.name, fast_bytes, token + FP32_BYTES, "one element and its sum")
        cols = minimum(self.dim, floor(fast_bytes / (token + FP32_BYTES)))
        rows = floor((fast_bytes - cols * FP32_BYTES) / (cols * token))
        return {"rows": minimum(self.len_seq, rows), "cols": cols}

    def work(self, fast_bytes: Num) -> Work:
        """6 flops and 3 special functions an element; in once, out once."""
        self.tiling(fast_bytes)
        channels, e = self.streams * self.dim, self.dtype.bytes_per_element
        n, sums = channels * self.len_seq, self.held * channels * FP32_BYTES
        return Work(
            vector_flops=GATE_FLOPS * n,
            special_ops=GATE_SPECIAL * n,
            read_bytes=n * e + sums,
            write_bytes=n * (e + FP32_BYTES) + sums,
        )

    def compulsory_bytes(self) -> Num:
        """Everything once."""
        return self.work(float(2**52)).bytes

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Keys spread widely enough for decays close to 0 and to 1."""
        streams, length, dim = (int(n) for n in (self.streams, self.len_seq, self.dim))
        found = {"k": 4 * rng.standard_normal((streams, length, dim))}
        return found | ({"z": 4 * rng.standard_normal((streams, dim))} if self.held else {})

    def reference(self, inputs: Arrays) -> Arrays:
        """Sums of exponentials of everything before, token by token."""
        k = inputs["k"]
        first = inputs["z"][:, None] if self.held else np.full_like(k[:, :1], -np.inf)
        seen = np.exp(np.concatenate([first, k], axis=1))
        z = np.log(np.stack([seen[:, : t + 2].sum(axis=1) for t in range(k.shape[1])], axis=1))
        before = np.concatenate([first if self.held else z[:, :1], z[:, :-1]], axis=1)
        found = {"k": np.exp(k - z), "g": before - z}
        return found | ({"z": z[:, -1]} if self.held else {})

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: of every stream some channels at a time, along its tokens."""
        a = {"k": machine.place(inputs["k"].copy(), self.dtype)}
        a["g"] = machine.empty(inputs["k"].shape, FP32)
        if self.held:
            a["z"] = machine.place(inputs["z"].copy(), FP32)
        cols = int(self.tiling(machine.fast_bytes)["cols"])
        with machine.kernel():
            for stream in range(len(inputs["k"])):
                for part in slices(int(self.dim), cols):
                    with machine.scope():
                        self._channels(machine, a, stream, part)
        return {name: array.values for name, array in a.items()}

    def _channels(self, mc: Machine, a: Mapping[str, SlowArray], stream: int, cols: slice) -> None:
        width = cols.stop - cols.start
        z = mc.load(a["z"], (stream, cols)) if self.held else mc.full((width,), -np.inf)
        for rows in slices(int(self.len_seq), int(self.tiling(mc.fast_bytes)["rows"])):
            with mc.scope():
                at = (stream, rows, cols)
                held = mc.load(a["k"], at)
                sums = np.logaddexp.accumulate(np.vstack([z.values, held.values]), axis=0)
                mc.count(vector=4 * held.values.size, special=2 * held.values.size)
                before, here = Lanes(mc, sums[:-1]), Lanes(mc, sums[1:])
                gates = before - here
                if rows.start == 0 and not self.held:
                    gates.values[0] = 0
                mc.store(gates.keep(FP32), a["g"], at)
                mc.store((Lanes(mc, held.values) - here).exp().into(held), a["k"], at)
                z.values[...] = sums[-1]
        if self.held:
            mc.store(z, a["z"], (stream, cols))


@dataclass(frozen=True, kw_only=True)
class LightNet(RecurrentAttention):
    """Q, K[batch, num_heads, len_seq, head_dim], V, O[..., value_dim].

    `len_seq` counts all tokens; `num_axes` is what other recurrences would have to scan along.
    `update` (causal) makes one step from the state that decoding keeps.

    >>> op = LightNet(num_heads=1, len_seq=4096, head_dim=64)
    >>> op.min_flops()[BF16] == 4 * 4096 * 64**2, op.num_scans(), op.directional_scans()
    (True, 1, 4)
    """

    name: ClassVar[str] = "lightnet"
    value_dim: Num | None = None
    num_axes: Num = 2
    causal: bool = False

    def check(self) -> None:
        """An update is one step of the causal form."""
        super().check()
        if self.update and not self.causal:
            raise InputError(
                f"{self.name}: without an order of the tokens there is no step; set causal"
            )

    @property
    def width_v(self) -> Num:
        """`value_dim`, else `head_dim`."""
        return self.head_dim if self.value_dim is None else self.value_dim

    # ---- passes over the sequence ----------------------------------------------------------

    def num_scans(self) -> Num:
        """Passes over the sequence with a state, as the stages have them."""
        return _scans(self.stages())

    def directional_stages(self) -> tuple[Stage, ...]:
        """What a recurrence that multiplies its decays runs on the same data: both ways an axis."""
        scan = self.chunks_of(self.head_dim, self.width_v, decay=True)
        return (Stage("scan", scan, 2 * self.num_axes),)

    def directional_scans(self) -> Num:
        """Passes of that recurrence."""
        return _scans(self.directional_stages())

    # ---- kernels ---------------------------------------------------------------------------

    def kernels(self) -> dict[str, ProvedOp]:
        """All stages by name, in the order they run."""
        if self.causal:
            gates = AdditiveDecay(
                streams=self.streams, len_seq=self.len_seq, dim=self.head_dim, held=self.update,
                dtype=self.dtype,
            )  # fmt: skip
            recurrence = self.recurrence_of(self.head_dim, self.width_v, decay=True)
            return {"gates": gates, "recur": recurrence}
        n, dk, dv = self.len_seq, self.head_dim, self.width_v
        return {
            "normalise": Softmax(rows=self.streams * dk, cols=n, dtype=self.dtype),
            "state": BatchedMatmul(batch=self.streams, m=dk, n=dv, k=n, dtype=self.dtype),
            "output": BatchedMatmul(batch=self.streams, m=n, n=dv, k=dk, dtype=self.dtype),
        }

    def stages(self) -> tuple[Stage, ...]:
        """Every kernel once."""
        return tuple(Stage(name, op) for name, op in self.kernels().items())

    def state_bytes(self) -> Num:
        """What decoding keeps of all heads, in fp32: S and z."""
        step = self.step_of(self.head_dim, self.width_v, decay=True)
        return step.state_bytes() + self.streams * self.head_dim * FP32_BYTES

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O once, the state of an update."""
        elements = 2 * self.streams * self.len_seq * (self.head_dim + self.width_v)
        return elements * self.dtype.bytes_per_element + 2 * self.update * self.state_bytes()

    # ---- truth and program -----------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v; keys spread widely enough for decays close to 0 and to 1."""
        shape = int(self.batch), int(self.num_heads), int(self.len_seq)
        dk, dv = int(self.head_dim), int(self.width_v)
        found = {n: s * rng.standard_normal((*shape, dk)) for n, s in (("q", 1), ("k", 4))}
        found["v"] = rng.standard_normal((*shape, dv))
        if self.update:
            found["state"] = rng.standard_normal((*shape[:2], dk, dv))
            found["z"] = 4 * rng.standard_normal((*shape[:2], dk))
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """The softmax over the keys that a query sees, channel by channel."""
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        if self.update:
            return self._reference_step(inputs)
        o = np.empty_like(v)
        for t in range(q.shape[2]):
            seen = t + 1 if self.causal else q.shape[2]
            weight = np.exp(k[:, :, :seen])
            weight = weight / weight.sum(axis=2, keepdims=True)
            o[:, :, t] = np.einsum("bhd,bhjd,bhje->bhe", q[:, :, t], weight, v[:, :, :seen])
        return {"o": o}

    def _reference_step(self, inputs: Arrays) -> Arrays:
        k, before = np.exp(inputs["k"][:, :, 0]), np.exp(inputs["z"])
        total = (before + k)[..., None]
        state = before[..., None] / total * inputs["state"]
        state = state + (k[..., None] / total) * inputs["v"]
        o = np.einsum("bhd,bhde->bhe", inputs["q"][:, :, 0], state)[:, :, None]
        return {"o": o, "state": state, "z": np.log(total[..., 0])}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Gates and recurrence, or softmax and two products."""
        return self._ordered(step, inputs) if self.causal else self._unordered(step, inputs)

    def _ordered(self, step: Step, inputs: Arrays) -> Arrays:
        ops, shape = self.kernels(), inputs["k"].shape
        given = {"k": _flat(inputs["k"])}
        if self.update:
            given["z"] = inputs["z"].reshape(-1, shape[3])
        gated = step(ops["gates"], given)
        tokens = {name: gated[name].reshape(shape) for name in ("k", "g")}
        tokens |= {name: inputs[name] for name in ("q", "v")}
        found = dict(recurred(step, ops["recur"], tokens, inputs))
        return found | ({"z": gated["z"].reshape(inputs["z"].shape)} if self.update else {})

    def _unordered(self, step: Step, inputs: Arrays) -> Arrays:
        ops, n = self.kernels(), int(self.len_seq)
        keys = _flat(inputs["k"]).swapaxes(1, 2)  # rows along N: addressing
        weight = step(ops["normalise"], {"x": keys.reshape(-1, n)})["y"].reshape(keys.shape)
        state = step(ops["state"], {"a": weight, "b": _flat(inputs["v"])})["c"]
        o = step(ops["output"], {"a": _flat(inputs["q"]), "b": state})["c"]
        return {"o": o.reshape(inputs["v"].shape)}


def _flat(x: Values) -> Values:
    """[batch, heads, ...] as [streams, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _scans(stages: tuple[Stage, ...]) -> Num:
    return sum(stage.times for stage in stages if stage.name in SCANS)

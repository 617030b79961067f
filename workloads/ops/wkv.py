"""SpikeGPT's token mixing: RWKV's recurrence between projections of binary spikes.

Zhu et al. 2023 (arXiv 2302.13939, sections 3.1 and 3.3; the recurrence: Peng et al. 2023,
arXiv 2305.13048, equation 16 and appendix D). With spikes S[tokens, dim] of 0 and 1:

    k, v, r = S W_k, S W_v, S W_r
    wkv_t   = (sum_(i<t) e^(k_i - (t-1-i) w) v_i + e^(u + k_t) v_t) / (the same without v)
    y       = LIF((sigmoid(r) wkv) W_o)

    LIF     h = h + (x - h) / tau,  s = 1 where h >= 1, else 0,  h = h (1 - s)      tau = 2

The recurrence keeps numerator, denominator and the largest exponent so far, so that no exponent is
positive: 19 flops and 5 special functions a channel and step. A product with spikes needs no
multiplication: hardware driven by events adds one row of W for each spike,

    tokens ceil(spike_frac dim) n   additions instead of   tokens dim n   multiply-adds

A GPU multiplies them densely, which is the default; `event_driven` counts the masked additions.

Ignored: norms, residuals, the mixing of each token with the one before it (a factor that folds
into two copies of the weights), the feed-forward block, how spikes are packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, Tile, Values
from workloads.numeric import Num, ceil_div, floor, maximum
from workloads.op import Arrays, Stage
from workloads.ops.cell_map import CellMap, sigmoid_mul
from workloads.ops.channel_scan import ChannelScan, at_least, held_lanes, larger
from workloads.ops.matmul import Matmul
from workloads.ops.row_map import RowMap
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.streamed import Lanes
from workloads.work import Work

TAU, THRESHOLD = 2.0, 1.0
"""Time constant in steps and threshold of the neurons, as published code sets them."""
LOWEST: Final = -1e38
"""Largest exponent of an empty state."""
PARTS: Final = 1000
"""Spike fractions are taken in thousandths, so that counts of spikes are whole."""


@dataclass(frozen=True, kw_only=True)
class Wkv(ChannelScan):
    """RWKV's recurrence over k, v[batch, len_seq, channels] with w, u[channels].

    >>> op = Wkv(len_seq=1024, channels=768)
    >>> op.work(2**16).vector_flops == 19 * 1024 * 768, op.state_bytes() == 3 * 4 * 768
    (True, True)
    """

    name: ClassVar[str] = "wkv"
    sources: ClassVar[tuple[str, ...]] = ("k", "v")
    params: ClassVar[tuple[str, ...]] = ("w", "u")
    states: ClassVar[tuple[float, ...]] = (0.0, 0.0, LOWEST)
    flops: ClassVar[int] = 19
    special: ClassVar[int] = 5

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Decays e^-w from next to 1 to next to 0."""
        given = dict(super().inputs(rng))
        given["w"] = 10 ** rng.uniform(-6, 1.5, int(self.channels))
        given["k"] = 4 * given["k"]
        return given

    def step(self, given: Sequence[Lanes], params: Sequence[Lanes], held: Sequence[Tile]) -> Lanes:
        """Output with the bonus u, then the state one step further."""
        (k, v), (w, u) = given, params
        above, below, top = (held_lanes(k, tile) for tile in held)
        bonus = u + k
        peak = larger(top, bonus)
        old, new = (top - peak).exp(), (bonus - peak).exp()
        y = (old * above + new * v) * (old * below + new).reciprocal()
        fading = top - w
        peak = larger(fading, k)
        old, new = (fading - peak).exp(), (k - peak).exp()
        (old * above + new * v).into(held[0])
        (old * below + new).into(held[1])
        peak.into(held[2])
        return y

    def reference(self, inputs: Arrays) -> Arrays:
        """The sums of the definition for every step, exponents relative to the largest."""
        k, v, w, u = (inputs[name] for name in ("k", "v", "w", "u"))
        y = np.empty_like(v)
        for t in range(k.shape[1]):
            age = np.maximum(t - 1 - np.arange(t + 1), 0)[None, :, None]
            weight = k[:, : t + 1] - age * w
            weight[:, t] += u
            weight = np.exp(weight - weight.max(axis=1, keepdims=True))
            y[:, t] = (weight * v[:, : t + 1]).sum(axis=1) / weight.sum(axis=1)
        return {"y": y}


@dataclass(frozen=True, kw_only=True)
class SpikingNeurons(ChannelScan):
    """Leaky integrate-and-fire neurons: x[batch, len_seq, channels] to spikes of that shape.

    >>> SpikingNeurons(len_seq=8, channels=16).work(2**16).vector_flops == 6 * 8 * 16
    True
    """

    name: ClassVar[str] = "spiking_neurons"
    sources: ClassVar[tuple[str, ...]] = ("x",)
    states: ClassVar[tuple[float, ...]] = (0.0,)
    flops: ClassVar[int] = 6

    def step(self, given: Sequence[Lanes], params: Sequence[Lanes], held: Sequence[Tile]) -> Lanes:
        """Charge, fire, reset."""
        (x,) = given
        h = held_lanes(x, held[0])
        charged = h + (x - h) * (1 / TAU)
        spikes = at_least(charged, THRESHOLD)
        (charged * (1 - spikes)).into(held[0])
        return spikes

    def reference(self, inputs: Arrays) -> Arrays:
        """Step by step, by cases."""
        x = inputs["x"]
        h, y = np.zeros_like(x[:, 0]), np.empty_like(x)
        for t in range(x.shape[1]):
            h = h + (x[:, t] - h) / TAU
            y[:, t] = np.where(h >= THRESHOLD, 1.0, 0.0)
            h = np.where(h >= THRESHOLD, 0.0, h)
        return {"y": y}


@dataclass(frozen=True, kw_only=True)
class SpikingProduct(Matmul):
    """C = S W for spikes S[m, k], `spikes` of them in a row: W's rows added up where S is 1.

    Data move as in the dense product, spikes in the operands' format.

    >>> SpikingProduct(m=8, n=64, k=100, spikes=15).work(2**20).vector_flops == 8 * 15 * 64
    True
    """

    name: ClassVar[str] = "spiking_product"
    spikes: Num

    def stages(self) -> tuple[Stage, ...]:
        """What moves a dense product's operands, and the additions on the fp32 lanes."""
        dense = Matmul(
            m=self.m, n=self.n, k=self.k, batch=self.batch, dtype=self.dtype,
            out_dtype=self.out_dtype,
        )  # fmt: skip
        adds = RowMap(
            rows=self.batch * self.m, cols=self.n, vector_flops_per_element=self.spikes,
            dtype=self.dtype,
        )  # fmt: skip
        return (Stage("operands", dense), Stage("additions", adds))

    def work(self, fast_bytes: Num) -> Work:
        """The dense product's traffic; m n spikes additions and no product."""
        reads = self.tiling(fast_bytes)["read_elements"]
        return Work(
            vector_flops=self.batch * self.m * self.n * self.spikes,
            read_bytes=self.batch * reads * self.dtype.bytes_per_element,
            write_bytes=self.batch * self.m * self.n * self.written_dtype.bytes_per_element,
        )

    def io_lower_bound_bytes(self, fast_bytes: Num) -> Num:
        """Each operand once: the dense bound does not hold where most of S is 0."""
        return self.compulsory_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """S with `spikes` ones in every row, W random."""
        given = dict(super().inputs(rng))
        order = rng.random(given["a"].shape).argsort(axis=-1)
        return {**given, "a": np.where(order < int(self.spikes), 1.0, 0.0)}

    def run(self, machine: Machine, a: SlowArray, b: SlowArray, c: SlowArray) -> None:
        """The dense product's loops over tiles, additions in place of products."""
        super().run(_Adding(machine, spikes_left=True), a, b, c)  # type: ignore[arg-type]

    def _b_stays(
        self, mc: Machine, t: Mapping[str, int], i: int, a: SlowArray, b: SlowArray, c: SlowArray
    ) -> None:
        """Turned round, the spikes are the operand on the right."""
        turned = _Adding(mc.machine, spikes_left=False)  # type: ignore[attr-defined]
        super()._b_stays(turned, t, i, a, b, c)  # type: ignore[arg-type]


class _Adding:
    """A machine whose product of spikes and weights adds up the weights that spikes select."""

    def __init__(self, machine: Machine, *, spikes_left: bool) -> None:
        self.machine, self.spikes_left = machine, spikes_left

    def __getattr__(self, name: str) -> Any:
        return getattr(self.machine, name)

    def matmul(self, a: Tile, b: Tile, dtype: DType, *, into: Tile) -> Tile:
        """Into the tile, one addition for each spike and column of the other operand."""
        spikes = a.values if self.spikes_left else b.values.T
        weights = b.values if self.spikes_left else a.values.T
        added = np.zeros((spikes.shape[0], weights.shape[1]))
        for row, fired in enumerate(spikes > 0):
            added[row] = weights[fired].sum(axis=0)
            self.machine.count(vector=fired.sum() * weights.shape[1])
        values = added if self.spikes_left else added.T
        return self.machine.vector(into.values + values, per_element=0, into=into)


@dataclass(frozen=True, kw_only=True)
class SpikingTokenMix(ProvedStagedOp):
    """One layer's token mixing: spikes[batch len_seq, dim] to spikes of that shape.

    `spike_frac` is the share of ones, which depends on the data; 0.15 is a chosen default, not a
    figure of the paper.

    >>> op = SpikingTokenMix(len_seq=1024, dim=768)
    >>> op.stages()[0].op.min_flops()[BF16] == 2 * 1024 * 768 * 3 * 768
    True
    >>> op.synaptic_ops() == 1024 * 116 * 3 * 768   # ceil(0.15 768) = 116 rows of three products
    True
    """

    name: ClassVar[str] = "spiking_token_mix"
    batch: Num = 1
    len_seq: Num
    dim: Num
    spike_frac: Num = 0.15
    event_driven: bool = False
    dtype: DType = BF16

    @property
    def tokens(self) -> Num:
        """Rows of the layer's input."""
        return self.batch * self.len_seq

    def spikes(self) -> Num:
        """Ones of a token's vector, at least one."""
        parts = floor(self.spike_frac * PARTS + 0.5)
        return maximum(ceil_div(self.dim * parts, PARTS), 1)

    def synaptic_ops(self) -> Num:
        """Additions of event-driven products with spikes: key, value and receptance."""
        return self.tokens * self.spikes() * 3 * self.dim

    def state_bytes(self) -> Num:
        """What decoding keeps: the recurrence's three numbers and the neurons' potentials."""
        return self.recurrence().state_bytes() + self.neurons().state_bytes()

    def projection(self) -> Matmul:
        """Spikes to k, v and r side by side."""
        shape: dict[str, Any] = {
            "m": self.tokens, "n": 3 * self.dim, "k": self.dim,
            "dtype": self.dtype, "out_dtype": FP32,
        }  # fmt: skip
        if self.event_driven:
            return SpikingProduct(**shape, spikes=self.spikes())
        return Matmul(**shape)

    def recurrence(self) -> Wkv:
        """In fp32, as published kernels run it."""
        return Wkv(batch=self.batch, len_seq=self.len_seq, channels=self.dim)

    def gate(self) -> CellMap:
        """sigmoid(r) wkv."""
        return sigmoid_mul(self.tokens * self.dim, FP32, self.dtype)

    def output(self) -> Matmul:
        """Back to the model's dimension; its operand is no spike."""
        return Matmul(m=self.tokens, n=self.dim, k=self.dim, dtype=self.dtype, out_dtype=FP32)

    def neurons(self) -> SpikingNeurons:
        """The layer's neurons."""
        return SpikingNeurons(batch=self.batch, len_seq=self.len_seq, channels=self.dim)

    def stages(self) -> tuple[Stage, ...]:
        """Projections, recurrence, gate, output projection, neurons."""
        return (
            Stage("project", self.projection()),
            Stage("recur", self.recurrence()),
            Stage("gate", self.gate()),
            Stage("output", self.output()),
            Stage("fire", self.neurons()),
        )

    def compulsory_bytes(self) -> Num:
        """Spikes in, spikes out, weights, w and u."""
        values = self.tokens * self.dim + 4 * self.dim**2
        return values * self.dtype.bytes_per_element + 4 * (self.tokens + 2) * self.dim

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Spikes, as many in every row; weights and the recurrence's parameters."""
        d, s = int(self.dim), int(self.spikes())
        product = SpikingProduct(m=self.tokens, n=3 * self.dim, k=self.dim, spikes=s)
        found = product.inputs(rng)
        fixed = self.recurrence().inputs(rng)
        return {
            "spikes": found["a"][0], "w_in": found["b"][0], "w": fixed["w"], "u": fixed["u"],
            "w_out": rng.standard_normal((d, d)),
        }  # fmt: skip

    def reference(self, inputs: Arrays) -> Arrays:
        """Dense products and the definitions of recurrence and neurons."""
        k, v, r = self._by_sequence(inputs["spikes"] @ inputs["w_in"])
        given = {"k": k, "v": v, "w": inputs["w"], "u": inputs["u"]}
        wkv = self.recurrence().reference(given)["y"]
        mixed = (wkv / (1 + np.exp(-r))) @ inputs["w_out"]
        return {"spikes": self._flat(self.neurons().reference({"x": mixed})["y"])}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        given = {"a": inputs["spikes"][None], "b": inputs["w_in"][None]}
        k, v, r = self._by_sequence(self.projection().program(machine, given)["c"][0])
        fixed = {"w": inputs["w"], "u": inputs["u"]}
        wkv = self.recurrence().program(machine, {"k": k, "v": v, **fixed})["y"]
        flat = {"x0": r.reshape(-1), "x1": wkv.reshape(-1)}
        gated = self.gate().program(machine, flat)["y0"].reshape(1, int(self.tokens), -1)
        mixed = self.output().program(machine, {"a": gated, "b": inputs["w_out"][None]})["c"][0]
        shape = (int(self.batch), int(self.len_seq), -1)
        fired = self.neurons().program(machine, {"x": mixed.reshape(shape)})["y"]
        return {"spikes": self._flat(fired)}

    def _by_sequence(self, x: Values) -> list[Values]:
        """[tokens, 3 dim] as three arrays [batch, len_seq, dim]."""
        shape = (int(self.batch), int(self.len_seq), -1)
        return [part.reshape(shape) for part in np.split(x, 3, axis=1)]

    def _flat(self, x: Values) -> Values:
        return x.reshape(int(self.tokens), -1)

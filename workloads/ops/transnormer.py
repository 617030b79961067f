"""The token mixer of TransNormerLLM: Lightning Attention between its feature map, norm and gate.

    o = u . SRMSNorm(LA(phi(q), phi(k), v)),    SRMSNorm(x) = x sqrt(d) / |x|
    LA(q, k, v)_t = sum_{s <= t} lambda^(t - s) (q_t . k_s) v_s,    phi(x) = x sigmoid(x)

(Qin et al. 2023, arXiv 2307.14995, section 3; the same mixer in TNL, arXiv 2405.17381, section 3.)
lambda is one number a head; LA runs in blocks of `chunk` tokens, inside them by the left product,
between them by a state of d x d (Lightning Attention-2, arXiv 2401.04658), or with `left` by the
left product alone (Lightning Attention-1). With `lrpe`, which the first layer has, positions turn
phi by an angle (LRPE-d, section 3.1): phi(x)_t becomes [phi cos(t theta), phi sin(t theta)], twice
as wide, so that scores carry lambda^(t - s) cos((t - s) theta).

SRMSNorm has no weights; it is counted as an RMSNorm, whose weights are a row more to read. Ignored:
the projections around the mixer, theta as learned numbers (one for each pair of a head).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values, slices
from workloads.numeric import Num, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import Elementwise, mul
from workloads.ops.lightning_attention_1 import LightningAttention1
from workloads.ops.linear_recurrence import SCALAR, LinearRecurrence
from workloads.ops.norm import EPSILON, RmsNorm
from workloads.ops.recurrent_attention import SUB_CHUNK, RecurrentAttention, recurred
from workloads.ops.recurrent_step import RecurrentStep
from workloads.ops.staged import Step
from workloads.ops.streamed import Lanes
from workloads.work import Work

SWISH, TURN = (2, 2), (3, 2)
"""Vector flops and special functions an element: x sigmoid(x); the angle, its cos and sin, two
products."""
ROTATION_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class SwishFeatures(ProvedOp):
    """phi of x[streams, len_seq, dim]; with `lrpe` turned by position, 2 dim wide.

    Positions start at zero.

    >>> SwishFeatures(streams=2, len_seq=10, dim=64, lrpe=True).work(2**16).bytes == 20 * 64 * 3 * 2
    True
    """

    name: ClassVar[str] = "swish_features"
    streams: Num = 1
    len_seq: Num
    dim: Num
    lrpe: bool = False
    dtype: DType = BF16

    @property
    def width(self) -> Num:
        """Features of a token."""
        return self.dim * (1 + self.lrpe)

    def _counts(self) -> tuple[int, int]:
        return SWISH[0] + TURN[0] * self.lrpe, SWISH[1] + TURN[1] * self.lrpe

    def stages(self) -> tuple[Stage, ...]:
        """A pointwise kernel of one output, or two."""
        vector, special = self._counts()
        one = Elementwise(
            num_elements=self.streams * self.len_seq * self.dim, num_outputs=1 + self.lrpe,
            vector_flops_per_element=vector, special_ops_per_element=special, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("features", one),)

    def row_bytes(self) -> Num:
        """A token in and its features out."""
        return (self.dim + self.width) * self.dtype.bytes_per_element

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Tokens held at a time."""
        require_fit(self.name, fast_bytes, self.row_bytes(), "one token and its features")
        return {"rows": minimum(self.len_seq, floor(fast_bytes / self.row_bytes()))}

    def work(self, fast_bytes: Num) -> Work:
        """In once, out once; the flops of the constants above."""
        self.tiling(fast_bytes)
        n, e = self.streams * self.len_seq, self.dtype.bytes_per_element
        vector, special = self._counts()
        return Work(
            vector_flops=n * self.dim * vector,
            special_ops=n * self.dim * special,
            read_bytes=n * self.dim * e,
            write_bytes=n * self.width * e,
        )

    def compulsory_bytes(self) -> Num:
        """In once, out once."""
        return self.streams * self.len_seq * self.row_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x[streams, len_seq, dim]."""
        shape = (int(self.streams), int(self.len_seq), int(self.dim))
        return {"x": rng.standard_normal(shape)}

    def reference(self, inputs: Arrays) -> Arrays:
        """As complex numbers phi e^(i t theta), real and imaginary parts side by side."""
        x = inputs["x"]
        y = x / (1 + np.exp(-x))
        if self.lrpe:
            turned = y * np.exp(1j * np.arange(x.shape[1])[:, None] * angles(x.shape[2]))
            y = np.concatenate([turned.real, turned.imag], axis=-1)
        return {"y": y}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel over blocks of tokens."""
        x = machine.place(inputs["x"], self.dtype)
        y = machine.empty((*x.values.shape[:2], int(self.width)), self.dtype)
        step = int(self.tiling(machine.fast_bytes)["rows"])
        with machine.kernel():
            for stream in range(len(x.values)):
                for rows in slices(int(self.len_seq), step):
                    with machine.scope():
                        found = self._block(
                            Lanes(machine, machine.load(x, (stream, rows)).values), rows
                        )
                        machine.store(
                            Lanes(machine, found).keep(self.dtype), y, (stream, rows)
                        )  # fmt: skip
        return {"y": y.values}

    def _block(self, x: Lanes, rows: slice) -> Values:
        """phi of a block of tokens."""
        y = x * (1 + (-x).exp()).reciprocal()
        if not self.lrpe:
            return y.values
        mc, count = x.machine, x.values.size
        angle = np.arange(rows.start, rows.stop)[:, None] * angles(x.values.shape[1])
        mc.count(vector=count, special=2 * count)  # the angle; its cosine and sine
        parts = (y * Lanes(mc, np.cos(angle)), y * Lanes(mc, np.sin(angle)))
        return np.concatenate([part.values for part in parts], axis=-1)


def angles(dim: int) -> Values:
    """theta of each dimension, as the learned ones start: 10000^(-2 j / dim).

    >>> angles(2).tolist()
    [1.0, 0.0001]
    """
    found: Values = ROTATION_BASE ** (-2 * np.arange(dim) / dim)
    return found


@dataclass(frozen=True, kw_only=True)
class TransnormerAttention(RecurrentAttention):
    """q, k, v, u and o[batch, num_heads, len_seq, head_dim], log decays g[num_heads] <= 0.

    With `update` it makes one step (len_seq = 1) from the state that decoding keeps.

    >>> op = TransnormerAttention(num_heads=16, len_seq=8192, head_dim=128)
    >>> op.state_bytes() == 16 * 128**2 * 4
    True
    """

    name: ClassVar[str] = "transnormer_attention"
    lrpe: bool = False
    left: bool = False

    def check(self) -> None:
        """An update has no positions to turn by, and a state to start from."""
        super().check()
        if self.update and (self.lrpe or self.left):
            raise InputError(
                f"{self.name}: an update starts from a state and turns nothing; "
                "leave lrpe and left out"
            )
        if self.left and self.lrpe:
            raise InputError(
                f"{self.name}: the left product is counted at one width; leave lrpe or left out"
            )

    def features(self) -> SwishFeatures:
        """phi of all queries, or keys."""
        return SwishFeatures(
            streams=self.streams, len_seq=self.len_seq, dim=self.head_dim, lrpe=self.lrpe,
            dtype=self.dtype,
        )  # fmt: skip

    def recurrence(self) -> LinearRecurrence | RecurrentStep | LightningAttention1:
        """Lightning Attention-2, its step, or with `left` Lightning Attention-1."""
        if self.update:
            return self.step_of(self.head_dim, self.head_dim, decay=True)
        if self.left:
            return LightningAttention1(
                batch=self.batch, num_heads=self.num_heads, len_seq=self.len_seq,
                head_dim=self.head_dim, dtype=self.dtype,
            )  # fmt: skip
        return LinearRecurrence(
            batch=self.batch, num_heads=self.num_heads, len_seq=self.len_seq,
            key_dim=self.features().width, value_dim=self.head_dim, chunk=self.chunk,
            sub_chunk=minimum(SUB_CHUNK, self.chunk), decay=SCALAR, dtype=self.dtype,
        )  # fmt: skip

    def norm(self) -> RmsNorm:
        """SRMSNorm over the heads of a token."""
        return RmsNorm(
            rows=self.batch * self.len_seq, cols=self.num_heads * self.head_dim, dtype=self.dtype
        )

    def gate(self) -> Elementwise:
        """u times the normed output."""
        return mul(self.rows * self.head_dim, self.dtype)

    def state_bytes(self) -> Num:
        """What decoding keeps of all heads, in fp32."""
        return self.step_of(self.features().width, self.head_dim, decay=True).state_bytes()

    def stages(self) -> tuple[Stage, ...]:
        """phi of queries and of keys, the recurrence, norm and gate."""
        return (
            Stage("features", self.features(), 2),
            Stage("recur", self.recurrence()),
            Stage("norm", self.norm()),
            Stage("gate", self.gate()),
        )

    def compulsory_bytes(self) -> Num:
        """q, k, v, u and o once, the state of an update in and out."""
        elements = 5 * self.rows * self.head_dim
        return elements * self.dtype.bytes_per_element + 2 * self.update * self.state_bytes()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v, u; decays from next to 1 down to next to 0; the state of an update."""
        heads, d = int(self.num_heads), int(self.head_dim)
        shape = (int(self.batch), heads, int(self.len_seq), d)
        found = {name: rng.standard_normal(shape) for name in ("q", "k", "v", "u")}
        found["g"] = -(10 ** rng.uniform(-6, 1.5, heads))
        if self.update:
            found["state"] = rng.standard_normal((shape[0], heads, d, d))
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """All scores written out, decayed and masked; then norm and gate of whole tokens."""
        phi = {name: self._phi(inputs[name], _naive) for name in ("q", "k")}
        times = np.arange(inputs["q"].shape[2])
        gap = np.maximum(times[:, None] - times, 0)
        decay = np.tril(np.exp(inputs["g"][:, None, None] * gap))
        o = (phi["q"] @ phi["k"].swapaxes(2, 3) * decay) @ inputs["v"]
        found = {}
        if self.update:
            kept = np.exp(inputs["g"])[:, None, None] * inputs["state"]
            o = o + phi["q"] @ kept
            found["state"] = kept + phi["k"].swapaxes(2, 3) @ inputs["v"]
        rows = _tokens(o)
        scale = (np.mean(rows**2, axis=-1, keepdims=True) + EPSILON) ** -0.5
        return {**found, "o": inputs["u"] * _heads(rows * scale, o.shape)}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Map queries, map keys, run the recurrence, norm, gate."""
        phi = {name: self._phi(inputs[name], step) for name in ("q", "k")}
        found = self._recurred(step, phi | {"v": inputs["v"]}, inputs)
        o = found["o"]
        rows = _tokens(o)
        normed = step(self.norm(), {"x": rows, "weight": np.ones(rows.shape[1])})["y"]
        gated = step(
            self.gate(), {"x0": inputs["u"].ravel(), "x1": _heads(normed, o.shape).ravel()}
        )["y0"]
        return {**found, "o": gated.reshape(o.shape)}

    def _recurred(self, step: Step, tokens: Arrays, inputs: Arrays) -> Arrays:
        """The recurrence with the decays in the form that it takes."""
        op, g = self.recurrence(), inputs["g"]
        if isinstance(op, LightningAttention1):
            return step(op, {**tokens, "g": g})
        if isinstance(op, RecurrentStep):
            every = np.broadcast_to(g[None, :, None, None], tokens["q"].shape)
        else:
            every = np.broadcast_to(g[None, :, None], tokens["q"].shape[:3])
        return recurred(step, op, {**tokens, "g": every}, inputs)

    def _phi(self, x: Values, step: Step) -> Values:
        found = step(self.features(), {"x": x.reshape(-1, *x.shape[2:])})["y"]
        return found.reshape(*x.shape[:3], -1)


def _naive(op: ProvedOp, given: Arrays) -> Arrays:
    return op.reference(given)


def _tokens(o: Values) -> Values:
    """[batch, heads, len, d] to rows of all heads."""
    found: Values = o.swapaxes(1, 2).reshape(o.shape[0] * o.shape[2], -1)
    return found


def _heads(rows: Values, shape: tuple[int, ...]) -> Values:
    """Rows of all heads back to [batch, heads, len, d]."""
    batch, heads, length, width = shape
    found: Values = rows.reshape(batch, length, heads, width).swapaxes(1, 2)
    return found

"""LMUFormer: a Legendre memory unit between convolutions, trained in parallel, run step by step.

The memory m_t = A m_{t-1} + B u_t of a scalar u_t has fixed A and B, so that its d kernels
H_i = (A^k B)_i are made once for all: every state is a long convolution of the same signal (Liu et
al. 2024, arXiv 2402.04882; Chilkuri and Eliasmith 2021, arXiv 2102.11417, equations 18 to 26).

    u = w_u x                          one number a token
    U = FFT(u),  M_i = U H_i,  m_i = FFT^-1(M_i)      one transform in, d back, a sequence
    h = W_h [m x]

or with `recurrent` token after token: m <- [A B] [m u]. The model around it:

    embed    `num_convs` convolutions over time of width 3 (causal where streamed: their last two
             inputs are kept), one more added to their result
    block    h as above, a product, added to x; two products (a feed-forward layer), added
    head     to the classes, of every token

Ignored: rectifiers, batch norms (folded into the products), concatenation, the mean over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values, slices
from workloads.numeric import Num, floor, minimum
from workloads.op import Arrays, Op, ProvedOp, Stage, require_fit
from workloads.ops.complex_lanes import PRODUCT_FLOPS, ComplexLanes
from workloads.ops.elementwise import Elementwise, add
from workloads.ops.fft_convolution import COMPLEX64
from workloads.ops.matmul import Matmul
from workloads.ops.row_fft import RowFFT, root_points
from workloads.ops.same_conv import SameConv
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.state_step import FP32_BYTES, as_stream
from workloads.work import Work

COMPLEX_BYTES: Final = 2 * FP32_BYTES
KERNEL: Final = 3
"""Width of the embedding's convolutions."""


@dataclass(frozen=True, kw_only=True)
class SpectrumProduct(ProvedOp):
    """y[batch, channels, m] = u[batch, m] h[channels, m], complex64: every signal by every filter.

        reads  8 m batch + 8 m channels,   writes  8 m batch channels,   flops  6 m batch channels

    >>> SpectrumProduct(batch=2, channels=8, num_points=64).work(2**12).vector_flops
    6144
    """

    name: ClassVar[str] = "spectrum_product"
    batch: Num = 1
    channels: Num
    num_points: Num

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a pointwise kernel of the same counts."""
        return (Stage("product", as_stream(self.work(float(2**52)))),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Points of a chunk: all signals beside one filter and one product."""
        each = (self.batch + 2) * COMPLEX_BYTES
        require_fit(self.name, fast_bytes, each, "a point of all signals", "make batch smaller")
        return {"chunk": minimum(self.num_points, floor(fast_bytes / each))}

    def work(self, fast_bytes: Num) -> Work:
        """The class docstring's."""
        self.tiling(fast_bytes)
        products = self.batch * self.channels * self.num_points
        return Work(
            vector_flops=products * PRODUCT_FLOPS,
            read_bytes=(self.batch + self.channels) * self.num_points * COMPLEX_BYTES,
            write_bytes=products * COMPLEX_BYTES,
        )

    def compulsory_bytes(self) -> Num:
        """Spectra once."""
        return self.work(float(2**52)).bytes

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random spectra."""
        m = int(self.num_points)
        rows = {"u": int(self.batch), "h": int(self.channels)}
        return {
            name: rng.standard_normal((count, m)) + 1j * rng.standard_normal((count, m))
            for name, count in rows.items()
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """With NumPy."""
        return {"y": inputs["u"][:, None] * inputs["h"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Chunks of points: signals stay, filters pass."""
        u, h = (machine.place(inputs[name], COMPLEX64) for name in ("u", "h"))
        batch, channels, m = int(self.batch), int(self.channels), int(self.num_points)
        y = machine.empty((batch, channels, m), COMPLEX64, is_complex=True)
        with machine.kernel():
            for part in slices(m, int(self.tiling(machine.fast_bytes)["chunk"])):
                with machine.scope():
                    signals = machine.load(u, (slice(None), part)).values
                    for channel in range(channels):
                        with machine.scope():
                            taps = machine.load(h, (channel, part)).values
                            filters = ComplexLanes.of(machine, taps)
                            for row in range(batch):
                                with machine.scope():
                                    found = filters.times(ComplexLanes.of(machine, signals[row]))
                                    tile = machine.hold(found.values, COMPLEX64)
                                    machine.store(tile, y, (row, channel, part))
        return {"y": y.values}


@dataclass(frozen=True, kw_only=True)
class TimedLayer(SteppedOp):
    """What works on x[batch, len_seq, dim], all tokens at once or one after another."""

    batch: Num = 1
    len_seq: Num
    dim: Num
    memory_dim: Num | None = None
    recurrent: bool = False
    dtype: DType = FP32
    math_dtype: DType | None = None

    @property
    def memory(self) -> Num:
        """States d of the memory: `memory_dim`, else `dim`."""
        return self.dim if self.memory_dim is None else self.memory_dim

    @property
    def calls(self) -> Num:
        """How often each stage runs."""
        return self.len_seq if self.recurrent else 1

    @property
    def rows(self) -> Num:
        """Tokens that run at once."""
        return self.batch * (1 if self.recurrent else self.len_seq)

    def linear(self, cols: Num, inner: Num) -> Matmul:
        """A product of the tokens that run at once."""
        return Matmul(m=self.rows, n=cols, k=inner, dtype=self.dtype, math_dtype=self.math_dtype)

    def memory_bytes(self) -> Num:
        """States of one memory, fp32."""
        return self.batch * self.memory * FP32_BYTES

    def token_bytes(self) -> Num:
        """All tokens of width dim."""
        return self.batch * self.len_seq * self.dim * self.dtype.bytes_per_element


@dataclass(frozen=True, kw_only=True)
class LegendreMemory(TimedLayer):
    """h[batch, len_seq, dim] from x of that shape.

    Spectra of the kernels are weights; with `recurrent` the states m[batch, d] are held.

    >>> op = LegendreMemory(batch=2, len_seq=128, dim=256)
    >>> op.min_flops()[FP32] == 2 * 256 * (256 + 256 * 512)
    True
    >>> op.memory_bytes() == 2 * 256 * 4
    True
    """

    name: ClassVar[str] = "legendre_memory"

    def num_parameters(self) -> Num:
        """Of w_u and W_h, with their biases; A, B and the spectra are fixed."""
        return self.dim + 1 + (self.memory + self.dim + 1) * self.dim

    def transform(self, rows: Num, *, inverse: bool = False) -> RowFFT:
        """Of signals, or back to states; twice the length, so that nothing wraps around."""
        return RowFFT(
            rows=rows, len_seq=2 * self.len_seq if inverse else self.len_seq,
            len_transform=2 * self.len_seq, inverse=inverse,
        )  # fmt: skip

    def spectra(self) -> SpectrumProduct:
        """Every signal by every kernel."""
        return SpectrumProduct(
            batch=self.batch, channels=self.memory, num_points=self.transform(1).num_points
        )

    def move(self) -> Matmul:
        """[A B] [m u] of one token; the states are fp32."""
        return Matmul(
            m=self.batch, n=self.memory, k=self.memory + 1, dtype=FP32, math_dtype=self.math_dtype
        )

    def stages(self) -> tuple[Stage, ...]:
        """Signal, states, hidden."""
        states: tuple[Stage, ...] = (Stage("move", self.move(), self.calls),)
        if not self.recurrent:
            states = (
                Stage("forward", self.transform(self.batch)),
                Stage("spectra", self.spectra()),
                Stage("inverse", self.transform(self.batch * self.memory, inverse=True)),
            )
        return (
            Stage("signal", self.linear(1, self.dim), self.calls),
            *states,
            Stage("hidden", self.linear(self.dim, self.memory + self.dim), self.calls),
        )

    def compulsory_bytes(self) -> Num:
        """x, h and the weights; in a recurrence A, B and the states before and after."""
        weights = (self.dim + (self.memory + self.dim) * self.dim) * self.dtype.bytes_per_element
        fixed = self.memory * self.transform(1).num_points * COMPLEX_BYTES
        if self.recurrent:
            fixed = self.memory * (self.memory + 1) * FP32_BYTES + 2 * self.memory_bytes()
        return 2 * self.token_bytes() + weights + fixed

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, w_u[dim, 1], w_h[d + dim, dim], a stable a[d, d], b[d]; recurrent: m[batch, d]."""
        batch, length, dim, d = (
            int(n) for n in (self.batch, self.len_seq, self.dim, self.memory)
        )  # fmt: skip
        a = rng.standard_normal((d, d))
        made = {
            "x": rng.standard_normal((batch, length, dim)),
            "w_u": rng.standard_normal((dim, 1)),
            "w_h": rng.standard_normal((d + dim, dim)),
            "a": a * rng.uniform(0.2, 0.99) / np.linalg.norm(a, ord=2),
            "b": rng.standard_normal(d),
        }
        return made | ({"m": rng.standard_normal((batch, d))} if self.recurrent else {})

    def reference(self, inputs: Arrays) -> Arrays:
        """The recurrence of the memory, step after step."""
        x, state = inputs["x"], inputs.get("m", 0.0)
        u, h = (x @ inputs["w_u"])[:, :, 0], np.empty_like(x)
        state = np.zeros((x.shape[0], int(self.memory))) + state
        for t in range(x.shape[1]):
            state = state @ inputs["a"].T + u[:, t, None] * inputs["b"]
            h[:, t] = np.concatenate([state, x[:, t]], axis=1) @ inputs["w_h"]
        return {"h": h} | ({"m": state} if self.recurrent else {})

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """All tokens, or token after token."""
        x = inputs["x"]
        if not self.recurrent:
            u = _product(step, self.linear(1, self.dim), x.reshape(-1, x.shape[2]), inputs["w_u"])
            states = self._states(step, u.reshape(x.shape[:2]), inputs)
            return {"h": self._hidden(step, states, x, inputs)}
        state, found = inputs["m"], []
        moving = np.concatenate([inputs["a"], inputs["b"][:, None]], axis=1).T
        for t in range(x.shape[1]):
            u = _product(step, self.linear(1, self.dim), x[:, t], inputs["w_u"])
            state = _product(step, self.move(), np.concatenate([state, u], axis=1), moving)
            found.append(self._hidden(step, state[:, None], x[:, t : t + 1], inputs))
        return {"h": np.concatenate(found, axis=1), "m": state}

    def _states(self, step: Step, u: Values, inputs: Arrays) -> Values:
        """m[batch, len_seq, d] from signals; the kernels' spectra were made before."""
        length, d = int(self.len_seq), int(self.memory)
        taps, vector = [], inputs["b"]
        for _ in range(length):
            taps.append(vector)
            vector = inputs["a"] @ vector
        table = root_points(int(self.transform(1).num_points)) ** np.arange(length)[:, None]
        filters: Values = np.stack(taps, 1) @ table
        signals = step(self.transform(self.batch), {"x": u})["y"]
        spectra = step(self.spectra(), {"u": signals, "h": filters})["y"]
        back = self.transform(self.batch * self.memory, inverse=True)
        m = step(back, {"x": spectra.reshape(-1, spectra.shape[2])})["y"]
        return m.reshape(u.shape[0], d, -1)[:, :, :length].swapaxes(1, 2)

    def _hidden(self, step: Step, states: Values, x: Values, inputs: Arrays) -> Values:
        both = np.concatenate([states, x], axis=2).reshape(-1, inputs["w_h"].shape[0])
        op = self.linear(self.dim, self.memory + self.dim)
        return _product(step, op, both, inputs["w_h"]).reshape(x.shape)


def _product(step: Step, op: Matmul, a: Values, b: Values) -> Values:
    found = step(op, {"a": a[None], "b": b[None]})["c"]
    return found.reshape(found.shape[1:])


@dataclass(frozen=True, kw_only=True)
class LmuFormer(TimedLayer):
    """Classes y[batch, len_seq, num_classes] of every token of x[batch, len_seq, in_channels].

    The defaults are those of the authors' Speech Commands model (35 words).

    >>> LmuFormer().num_parameters(), LmuFormer(batch=2).state_bytes() == 2 * 4 * (256 + 2 * 1152)
    (1621796, True)
    """

    name: ClassVar[str] = "lmuformer"
    len_seq: Num = 128
    dim: Num = 256
    in_channels: Num = 128
    num_convs: int = 4
    num_blocks: int = 1
    ffn_dim: Num | None = None
    num_classes: Num = 35

    def check(self) -> None:
        """At least one of each."""
        for name in ("num_convs", "num_blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{self.name}: {name} = {value} must be a whole number from 1")

    @property
    def hidden(self) -> Num:
        """Width of the feed-forward layer: `ffn_dim`, else four times `dim`."""
        return 4 * self.dim if self.ffn_dim is None else self.ffn_dim

    def num_parameters(self) -> Num:
        """With biases and batch norms, as trained."""
        d, norm = self.dim, 2
        embed = KERNEL * d * (self.in_channels + self.num_convs * d) + self.num_convs * norm * d
        project = d * (d + 1 + norm)
        ffn = self.hidden * (d + 1 + norm) + d * (self.hidden + 1 + norm)
        block = self.unit().num_parameters() + project + ffn
        return embed + self.num_blocks * block + self.num_classes * (d + 1)

    def history_bytes(self) -> Num:
        """Two inputs of every convolution."""
        channels = self.in_channels + self.num_convs * self.dim
        return self.batch * (KERNEL - 1) * channels * self.dtype.bytes_per_element

    def state_bytes(self) -> Num:
        """What running token after token keeps, whatever the length: memories and histories."""
        return self.num_blocks * self.memory_bytes() + self.history_bytes()

    def unit(self) -> LegendreMemory:
        """The memory of a block: over all tokens, or one."""
        return LegendreMemory(
            batch=self.batch, len_seq=1 if self.recurrent else self.len_seq, dim=self.dim,
            memory_dim=self.memory_dim, recurrent=self.recurrent, dtype=self.dtype,
            math_dtype=self.math_dtype,
        )  # fmt: skip

    def convolution(self, channels: Num) -> Op:
        """Of the tokens that run at once; of one, a product with what it sees."""
        if self.recurrent:
            return self.linear(self.dim, KERNEL * channels)
        return SameConv(
            batch=self.batch, in_channels=channels, out_channels=self.dim, height=self.len_seq,
            width=1, out_height=self.len_seq, out_width=1, kernel_h=KERNEL, kernel_w=1,
            dtype=self.dtype, math_dtype=self.math_dtype,
        )  # fmt: skip

    def sum(self) -> Elementwise:
        """Of two arrays of tokens."""
        return add(self.rows * self.dim, self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """Embedding, blocks, head."""
        times, blocks = self.calls, self.calls * self.num_blocks
        return (
            Stage("embed_first", self.convolution(self.in_channels), times),
            Stage("embed", self.convolution(self.dim), times * self.num_convs),
            Stage("memory", self.unit(), blocks),
            Stage("project", self.linear(self.dim, self.dim), blocks),
            Stage("widen", self.linear(self.hidden, self.dim), blocks),
            Stage("narrow", self.linear(self.dim, self.hidden), blocks),
            Stage("add", self.sum(), times + 2 * blocks),
            Stage("head", self.linear(self.num_classes, self.dim), times),
        )

    def compulsory_bytes(self) -> Num:
        """x, y and the products' weights; where streamed, memories before and after."""
        d, e = self.dim, self.dtype.bytes_per_element
        embed = KERNEL * d * (self.in_channels + self.num_convs * d)
        memory = d + (self.memory + d) * d
        block = memory + d * d + 2 * d * self.hidden
        weights = embed + self.num_blocks * block + d * self.num_classes
        tokens = self.batch * self.len_seq * (self.in_channels + self.num_classes)
        states = 2 * self.num_blocks * self.memory_bytes() if self.recurrent else 0
        return (weights + tokens) * e + states

    # ---- the program -------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, the weights of every layer; where streamed, histories and memories."""

        def normal(*shape: Num) -> Values:
            return rng.standard_normal([int(n) for n in shape])

        d, made = self.dim, {"x": normal(self.batch, self.len_seq, self.in_channels)}
        for i in range(self.num_convs + 1):
            channels = d if i else self.in_channels
            made[f"conv{i}"] = normal(KERNEL, channels, d) / KERNEL
            if self.recurrent:
                made[f"history{i}"] = normal(self.batch, KERNEL - 1, channels)
        for i in range(self.num_blocks):
            unit = self.unit().inputs(rng)
            made |= {f"{name}{i}": unit[name] for name in unit if name != "x"}
            made |= {
                f"project{i}": normal(d, d), f"widen{i}": normal(d, self.hidden),
                f"narrow{i}": normal(self.hidden, d),
            }  # fmt: skip
        return made | {"head": normal(d, self.num_classes)}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """All tokens through every layer, or token after token."""
        if not self.recurrent:
            return {"y": self._network(step, inputs, inputs["x"])[0]}
        now, found = dict(inputs), []
        for t in range(int(self.len_seq)):
            y, after = self._network(step, now, inputs["x"][:, t : t + 1])
            now |= after
            found.append(y)
        held = {name: now[name] for name in now if name.startswith(("history", "m"))}
        return {"y": np.concatenate(found, axis=1), **held}

    def _network(self, step: Step, given: Arrays, x: Values) -> tuple[Values, dict[str, Values]]:
        """The classes of tokens x, and what is held after them."""
        after: dict[str, Values] = {}
        for i in range(self.num_convs):
            x = self._convolved(step, given, i, x, after)
        x = self._added(step, x, self._convolved(step, given, self.num_convs, x, after))
        for i in range(self.num_blocks):
            names = ("w_u", "w_h", "a", "b", *(("m",) if self.recurrent else ()))
            found = step(self.unit(), {"x": x} | {name: given[f"{name}{i}"] for name in names})
            after |= {f"m{i}": found["m"]} if self.recurrent else {}
            x = self._added(step, x, self._linear(step, found["h"], given[f"project{i}"]))
            wide = self._linear(step, x, given[f"widen{i}"])
            x = self._added(step, x, self._linear(step, wide, given[f"narrow{i}"]))
        return self._linear(step, x, given["head"]), after

    def _convolved(
        self, step: Step, given: Arrays, i: int, x: Values, after: dict[str, Values]
    ) -> Values:
        taps, op = given[f"conv{i}"], self.convolution(x.shape[2])
        assert isinstance(op, ProvedOp)
        if not self.recurrent:
            return step(op, {"x": x[:, :, None], "w": taps[:, None]})["y"][:, :, 0]
        seen = np.concatenate([given[f"history{i}"], x], axis=1)
        after[f"history{i}"] = seen[:, 1:]
        return self._linear(step, seen.reshape(x.shape[0], 1, -1), taps.reshape(-1, taps.shape[2]))

    def _linear(self, step: Step, x: Values, weights: Values) -> Values:
        op = self.linear(weights.shape[1], weights.shape[0])
        found = _product(step, op, x.reshape(-1, x.shape[2]), weights)
        return found.reshape(*x.shape[:2], -1)

    def _added(self, step: Step, x: Values, y: Values) -> Values:
        found = step(self.sum(), {"x0": x.reshape(-1), "x1": y.reshape(-1)})["y0"]
        return found.reshape(x.shape)

"""Layers built around a long convolution: projections, short convolutions, gates, and it.

    Hyena            y = W (x_0 conv(x_1 v)),  (x_0, x_1, v) = short(W x)    (arXiv 2302.10866,
                     2306.15794: order 2, implicit filters from features of the positions)
    Orchid           the same with a filter made from the input itself       (arXiv 2402.18508)
    Monarch Mixer    Hyena's operator as it mixes the sequence, then a gated feed-forward layer of
                     block-diagonal matrices that mixes the model dimension  (arXiv 2310.12109)

Each stage is an op with counts, a program and a kernel model; the layer adds up and chains them.
Changes of layout between [tokens, channels] and [batch, channels, tokens] are addressing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true
from workloads.op import Arrays, Stage
from workloads.ops.elementwise import Elementwise, mul, silu_mul
from workloads.ops.fft_convolution import FFTConvolution, LongConvolution
from workloads.ops.flash_fft_conv import FlashFFTConv
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.short_conv import ShortConv
from workloads.ops.staged import ProvedStagedOp


@dataclass(frozen=True, kw_only=True)
class ConvLayer(ProvedStagedOp):
    """A layer over x[batch len_seq, dim]; weights have the activations' format."""

    batch: Num = 1
    len_seq: Num
    dim: Num
    dtype: DType = BF16

    @property
    def tokens(self) -> Num:
        """Rows of the layer's input."""
        return self.batch * self.len_seq

    def linear(self, cols: Num, inner: Num) -> Matmul:
        """A projection of every token from `inner` to `cols`."""
        return Matmul(m=self.tokens, n=cols, k=inner, dtype=self.dtype)

    def token_bytes(self) -> Num:
        """One pass over the layer's input, or its output."""
        return self.tokens * self.dim * self.dtype.bytes_per_element

    def by_channel(self, x: Values) -> Values:
        """[tokens, c] as [batch, c, len_seq]."""
        batch, length = int(self.batch), int(self.len_seq)
        return x.reshape(batch, length, -1).swapaxes(1, 2)

    def by_token(self, x: Values) -> Values:
        """The inverse of `by_channel`."""
        return x.swapaxes(1, 2).reshape(int(self.tokens), -1)


def product(machine: Machine, op: Matmul, a: Values, b: Values) -> Values:
    """The op's program on matrices, batched or not."""
    batched = a.ndim == 3
    given = {"a": a if batched else a[None], "b": b if batched else b[None]}
    c = op.program(machine, given)["c"]
    return c if batched else c[0]


def mapped(machine: Machine, op: Elementwise, *arrays: Values) -> Values:
    """The program of a pointwise op with one output, on arrays of any one shape."""
    flat = {f"x{i}": np.ascontiguousarray(x).reshape(-1) for i, x in enumerate(arrays)}
    return op.program(machine, flat)["y0"].reshape(arrays[0].shape)


@dataclass(frozen=True, kw_only=True)
class Hyena(ConvLayer):
    """Hyena's operator: `order` gates, order - 1 long convolutions, causal.

    With N = batch len_seq tokens of width d and the convolutions' counts F:

        products = 2 N d (order + 1) d + 2 N d d + 2 len_seq filter_dim (order - 1) d
        short    = 2 width N (order + 1) d vector flops

    The filters are a linear map of `filter_dim` features of each position; the small network that
    makes the features, and the decay window, are left out. `fused` convolutions are FlashFFTConv's,
    others go through a library's FFT, as those of HyenaDNA did.

    >>> op = Hyena(len_seq=1024, dim=128)
    >>> op.stages()[0].op.min_flops()[BF16] == 2 * 1024 * 3 * 128 * 128
    True
    """

    name: ClassVar[str] = "hyena"
    order: int = 2
    width: Num = 3
    filter_dim: Num = 64
    fused: bool = True

    def check(self) -> None:
        """At least one convolution between two gates."""
        if not isinstance(self.order, int) or self.order < 2:
            raise InputError(f"{self.name}: order = {self.order} must be a whole number from 2")

    def convolution(self) -> LongConvolution:
        """One long convolution between two gates."""
        kind = FlashFFTConv if self.fused else FFTConvolution
        return kind(
            batch=self.batch, channels=self.dim, len_seq=self.len_seq, gated=True,
            dtype=self.dtype,
        )  # fmt: skip

    def filters(self) -> Matmul:
        """Features of the positions to the filters of all convolutions."""
        return Matmul(
            m=self.len_seq, n=(self.order - 1) * self.dim, k=self.filter_dim, dtype=self.dtype
        )

    def short(self) -> ShortConv:
        """Over what the projection gives to gates and value."""
        return ShortConv(
            batch=self.batch, len_seq=self.len_seq, channels=(self.order + 1) * self.dim,
            width=self.width, dtype=self.dtype, activation=False,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Projection, short convolution, filters, gated long convolutions, output projection."""
        gated = self.convolution()
        stages = [
            Stage("project", self.linear((self.order + 1) * self.dim, self.dim)),
            Stage("short", self.short()),
            Stage("filters", self.filters()),
        ]
        if self.order > 2:
            stages += [
                Stage("gate", mul(self.tokens * self.dim, self.dtype), self.order - 2),
                Stage("inner", gated.over(gated=False), self.order - 2),
            ]
        return (*stages, Stage("convolve", gated), Stage("output", self.linear(self.dim, self.dim)))

    def compulsory_bytes(self) -> Num:
        """x and y, both projections, taps, features and their map, once each."""
        weights = (self.order + 2) * self.dim * self.dim
        weights = weights + (self.order + 1) * self.dim * self.width
        features = self.filter_dim * (self.len_seq + (self.order - 1) * self.dim)
        return 2 * self.token_bytes() + (weights + features) * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, the weights, and features of the positions."""
        d, n, f = int(self.dim), int(self.len_seq), int(self.filter_dim)
        parts = self.order + 1
        return {
            "x": rng.standard_normal((int(self.tokens), d)),
            "w_in": rng.standard_normal((d, parts * d)),
            "taps": rng.standard_normal((parts * d, int(self.width))),
            "features": rng.standard_normal((n, f)),
            "w_filter": rng.standard_normal((f, (self.order - 1) * d)),
            "w_out": rng.standard_normal((d, d)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The recurrence z <- conv(x_i z), y = W (x_0 z), with NumPy."""
        short = {"x": self._split(inputs["x"] @ inputs["w_in"]), "w": inputs["taps"]}
        parts = self._parts(self.short().reference(short)["y"])
        filters = self._by_convolution(inputs["features"] @ inputs["w_filter"])
        gated = self.convolution()
        *gates, z = parts
        for gate, taps in zip(reversed(gates[2:]), filters, strict=False):
            z = gated.over(gated=False).reference({"u": z * gate, "k": taps})["y"]
        last = {"u": z, "w": gates[1], "v": gates[0], "k": filters[-1]}
        y = gated.reference(last)["y"]
        return {"y": self.by_token(y) @ inputs["w_out"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        stages = {stage.name: stage.op for stage in self.stages()}
        projected = product(machine, self.linear((self.order + 1) * self.dim, self.dim),
                            inputs["x"], inputs["w_in"])  # fmt: skip
        short = {"x": self._split(projected), "w": inputs["taps"]}
        *gates, z = self._parts(self.short().program(machine, short)["y"])
        made = product(machine, self.filters(), inputs["features"], inputs["w_filter"])
        filters = self._by_convolution(made)
        gated = self.convolution()
        for gate, taps in zip(reversed(gates[2:]), filters, strict=False):
            pointwise = stages["gate"]
            assert isinstance(pointwise, Elementwise)
            u = mapped(machine, pointwise, z, gate)
            z = gated.over(gated=False).program(machine, {"u": u, "k": taps})["y"]
        last = {"u": z, "w": gates[1], "v": gates[0], "k": filters[-1]}
        y = self.by_token(gated.program(machine, last)["y"])
        return {"y": product(machine, self.linear(self.dim, self.dim), y, inputs["w_out"])}

    def _split(self, x: Values) -> Values:
        return x.reshape(int(self.batch), int(self.len_seq), -1)

    def _parts(self, x: Values) -> list[Values]:
        """[batch, len_seq, parts dim] as parts [batch, dim, len_seq]: gates, then the value."""
        return np.split(x.swapaxes(1, 2), self.order + 1, axis=1)

    def _by_convolution(self, filters: Values) -> list[Values]:
        """[len_seq, convolutions dim] as filters [dim, len_seq]."""
        return np.split(filters.T, self.order - 1, axis=0)


@dataclass(frozen=True, kw_only=True)
class Orchid(ConvLayer):
    """Hyena's operator whose filter is a short convolution of the value: one for every sequence.

    No spectrum of a filter serves a whole batch, so that a sequence and channel takes three
    transforms in every call, of value, filter and product. (The modulus that the paper takes of
    the filter's spectrum is left out: a pointwise map of it.)

    >>> op = Orchid(batch=2, len_seq=1024, dim=8)
    >>> int(op.convolution().channels), int(op.convolution().batch)
    (16, 1)
    """

    name: ClassVar[str] = "orchid"
    width: Num = 3
    condition_width: Num = 3

    def convolution(self) -> FFTConvolution:
        """Rows with a filter each."""
        return FFTConvolution(
            batch=1, channels=self.batch * self.dim, len_seq=self.len_seq, gated=True,
            dtype=self.dtype,
        )  # fmt: skip

    def short(self, parts: Num, width: Num) -> ShortConv:
        """A short convolution of `parts` times the model's channels."""
        return ShortConv(
            batch=self.batch, len_seq=self.len_seq, channels=parts * self.dim, width=width,
            dtype=self.dtype, activation=False,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Projection, short convolution, conditioning network, long convolution, projection."""
        return (
            Stage("project", self.linear(3 * self.dim, self.dim)),
            Stage("short", self.short(3, self.width)),
            Stage("condition", self.short(1, self.condition_width)),
            Stage("convolve", self.convolution()),
            Stage("output", self.linear(self.dim, self.dim)),
        )

    def compulsory_bytes(self) -> Num:
        """x and y, both projections and the taps, once each."""
        weights = self.dim * (4 * self.dim + 3 * self.width + self.condition_width)
        return 2 * self.token_bytes() + weights * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x and the weights."""
        d = int(self.dim)
        return {
            "x": rng.standard_normal((int(self.tokens), d)),
            "w_in": rng.standard_normal((d, 3 * d)),
            "taps": rng.standard_normal((3 * d, int(self.width))),
            "condition": rng.standard_normal((d, int(self.condition_width))),
            "w_out": rng.standard_normal((d, d)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """q * conv(k v; filter of v), with NumPy."""
        shaped = (int(self.batch), int(self.len_seq), -1)
        x = (inputs["x"] @ inputs["w_in"]).reshape(shaped)
        y = self.short(3, self.width).reference({"x": x, "w": inputs["taps"]})["y"]
        q, k, v = np.split(y, 3, axis=2)
        made = self.short(1, self.condition_width).reference({"x": v, "w": inputs["condition"]})
        out = self.convolution().reference(self._rows(q, k, v, made["y"]))["y"]
        return {"y": self._tokens(out) @ inputs["w_out"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        shaped = (int(self.batch), int(self.len_seq), -1)
        project = self.linear(3 * self.dim, self.dim)
        x = product(machine, project, inputs["x"], inputs["w_in"]).reshape(shaped)
        y = self.short(3, self.width).program(machine, {"x": x, "w": inputs["taps"]})["y"]
        q, k, v = np.split(y, 3, axis=2)
        condition = self.short(1, self.condition_width)
        made = condition.program(machine, {"x": v, "w": inputs["condition"]})["y"]
        out = self.convolution().program(machine, self._rows(q, k, v, made))["y"]
        output = self.linear(self.dim, self.dim)
        return {"y": product(machine, output, self._tokens(out), inputs["w_out"])}

    def _rows(self, q: Values, k: Values, v: Values, made: Values) -> Mapping[str, Values]:
        """[batch, len_seq, dim] each, as one sequence of batch dim channels."""
        u, w, out, taps = (
            x.swapaxes(1, 2).reshape(1, -1, int(self.len_seq)) for x in (v, k, q, made)
        )
        return {"u": u, "w": w, "v": out, "k": taps[0]}

    def _tokens(self, y: Values) -> Values:
        return self.by_token(y.reshape(int(self.batch), int(self.dim), int(self.len_seq)))


@dataclass(frozen=True, kw_only=True)
class MonarchMixer(ConvLayer):
    """Sequence mixer: a gated convolution by Monarch transforms; dimension mixer: block matrices.

    The feed-forward layer is gated and its matrices have `num_blocks` blocks on the diagonal, so
    that it takes 2 N 3 expansion d^2 / num_blocks flops instead of num_blocks times as many.
    Without `causal` the convolution is circular (len_seq a power of two).

    >>> op = MonarchMixer(len_seq=1024, dim=768)
    >>> op.mixer_weights() == 3 * 4 * 768 * 768 / 4
    True
    """

    name: ClassVar[str] = "monarch_mixer"
    cheaper: ClassVar[tuple[str, ...]] = ("num_blocks",)
    num_blocks: Num = 4
    expansion: Num = 4
    width: Num = 3
    causal: bool = False

    def check(self) -> None:
        """Blocks that divide; a length that a circular transform takes."""
        if any_true(self.dim % self.num_blocks != 0):
            raise InputError(
                f"{self.name}: num_blocks = {self.num_blocks} must divide dim = {self.dim}"
            )
        self.convolution()

    def convolution(self) -> FlashFFTConv:
        """The long convolution between its gates."""
        return FlashFFTConv(
            batch=self.batch, channels=self.dim, len_seq=self.len_seq, gated=True,
            circular=not self.causal, dtype=self.dtype,
        )  # fmt: skip

    def short(self) -> ShortConv:
        """Over gates and value."""
        return ShortConv(
            batch=self.batch, len_seq=self.len_seq, channels=3 * self.dim, width=self.width,
            dtype=self.dtype, activation=False,
        )  # fmt: skip

    def block(self) -> Num:
        """Rows of a diagonal block."""
        return self.dim // self.num_blocks

    def up(self) -> BatchedMatmul:
        """Gate and value of the feed-forward layer, block by block."""
        return BatchedMatmul(
            batch=self.num_blocks, m=self.tokens, n=2 * self.expansion * self.block(),
            k=self.block(), dtype=self.dtype,
        )  # fmt: skip

    def down(self) -> BatchedMatmul:
        """Back to the model's width, block by block."""
        return BatchedMatmul(
            batch=self.num_blocks, m=self.tokens, n=self.block(),
            k=self.expansion * self.block(), dtype=self.dtype,
        )  # fmt: skip

    def gate(self) -> Elementwise:
        """The feed-forward layer's gate."""
        return silu_mul(self.tokens * self.expansion * self.dim, self.dtype)

    def mixer_weights(self) -> Num:
        """Parameters of the dimension mixer."""
        return 3 * self.expansion * self.dim * self.block()

    def stages(self) -> tuple[Stage, ...]:
        """Hyena's operator, then the block-diagonal feed-forward layer."""
        return (
            Stage("project", self.linear(3 * self.dim, self.dim)),
            Stage("short", self.short()),
            Stage("convolve", self.convolution()),
            Stage("output", self.linear(self.dim, self.dim)),
            Stage("up", self.up()),
            Stage("gate", self.gate()),
            Stage("down", self.down()),
        )

    def compulsory_bytes(self) -> Num:
        """x and y, all weights and taps, and the filter in the least format, once each."""
        weights = 4 * self.dim * self.dim + self.mixer_weights()
        weights = weights + self.dim * (3 * self.width + self.len_seq)
        return 2 * self.token_bytes() + weights * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, the weights, the filter; scaled so that no exponential of the gate overflows."""
        d, n = int(self.dim), int(self.len_seq)
        blocks, block, wide = int(self.num_blocks), int(self.block()), int(self.expansion)
        return {
            "x": rng.standard_normal((int(self.tokens), d)),
            "w_in": rng.standard_normal((d, 3 * d)) / d,
            "taps": rng.standard_normal((3 * d, int(self.width))),
            "filter": rng.standard_normal((d, n)) / n,
            "w_out": rng.standard_normal((d, d)) / d,
            "w_up": rng.standard_normal((blocks, block, 2 * wide * block)),
            "w_down": rng.standard_normal((blocks, wide * block, block)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """With NumPy."""
        shaped = (int(self.batch), int(self.len_seq), -1)
        x = (inputs["x"] @ inputs["w_in"]).reshape(shaped)
        short = self.short().reference({"x": x, "w": inputs["taps"]})["y"]
        mixed = self.convolution().reference(self._gates(short, inputs))["y"]
        hidden = self._blocks(self.by_token(mixed) @ inputs["w_out"]) @ inputs["w_up"]
        gate, value = np.split(hidden, 2, axis=2)
        return {"y": self._joined((gate / (1 + np.exp(-gate)) * value) @ inputs["w_down"])}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        shaped = (int(self.batch), int(self.len_seq), -1)
        project = self.linear(3 * self.dim, self.dim)
        x = product(machine, project, inputs["x"], inputs["w_in"]).reshape(shaped)
        short = self.short().program(machine, {"x": x, "w": inputs["taps"]})["y"]
        mixed = self.convolution().program(machine, self._gates(short, inputs))["y"]
        output = self.linear(self.dim, self.dim)
        rows = self._blocks(product(machine, output, self.by_token(mixed), inputs["w_out"]))
        hidden = product(machine, self.up(), rows, inputs["w_up"])
        gate, value = np.split(hidden, 2, axis=2)
        wide = mapped(machine, self.gate(), gate, value)
        return {"y": self._joined(product(machine, self.down(), wide, inputs["w_down"]))}

    def _gates(self, short: Values, inputs: Arrays) -> Mapping[str, Values]:
        v, w, u = np.split(short.swapaxes(1, 2), 3, axis=1)
        return {"u": u, "v": v, "w": w, "k": inputs["filter"]}

    def _blocks(self, x: Values) -> Values:
        """[tokens, dim] as [num_blocks, tokens, block]."""
        return x.reshape(int(self.tokens), int(self.num_blocks), -1).swapaxes(0, 1)

    def _joined(self, x: Values) -> Values:
        return x.swapaxes(0, 1).reshape(int(self.tokens), -1)

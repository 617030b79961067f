"""TCNCA: a stack of dilated depthwise convolutions, then attention inside chunks.

The stack takes the place of MEGA's moving average by FFT (arXiv 2312.05605, section 3): layer i
of `depth` convolves each channel with `width` taps that lie `growth`^i apart, so that a token sees
1 + (width - 1) (1 + b + b^2 + ...) others. Attention is over chunks of `chunk` tokens, causal.
A dilated convolution is an ordinary one of the r subsequences that its dilation r leaves apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, minimum
from workloads.op import Arrays, Stage
from workloads.ops.conv_layer import ConvLayer, product
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.short_conv import ShortConv


@dataclass(frozen=True, kw_only=True)
class Tcnca(ConvLayer):
    """One layer over x[batch len_seq, dim].

    >>> op = Tcnca(len_seq=8192, dim=512, num_heads=1, depth=4)
    >>> op.receptive_field()  # 1 + 16 (1 + 2 + 4 + 8)
    241
    >>> op.stages()[0].op.work(2**16).vector_flops == (2 * 17 + 2) * 8192 * 512
    True
    """

    name: ClassVar[str] = "tcnca"
    num_heads: Num = 1
    width: Num = 17
    depth: int = 4
    growth: int = 2
    chunk: Num = 2048

    def check(self) -> None:
        """Subsequences, chunks and heads that come out even."""
        for field in ("depth", "growth"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{self.name}: {field} = {value} must be a whole number from 1")
        for name, size in (("dilation", self.dilation(self.depth - 1)), ("chunk", self.piece())):
            if any_true(self.len_seq % size != 0):
                raise InputError(
                    f"{self.name}: the {name} {size} must divide len_seq = {self.len_seq}; pad it"
                )
        if any_true(self.dim % self.num_heads != 0):
            raise InputError(
                f"{self.name}: num_heads = {self.num_heads} must divide dim = {self.dim}"
            )

    def dilation(self, layer: int) -> int:
        """Distance of the taps in that layer."""
        return int(self.growth**layer)

    def receptive_field(self) -> Num:
        """Tokens that one output of the stack depends on."""
        return 1 + (self.width - 1) * sum(self.dilation(i) for i in range(self.depth))

    def piece(self) -> Num:
        """Tokens of one chunk."""
        return minimum(self.chunk, self.len_seq)

    def convolution(self, layer: int) -> ShortConv:
        """One layer of the stack, subsequence by subsequence, with its activation."""
        apart = self.dilation(layer)
        return ShortConv(
            batch=self.batch * apart, len_seq=self.len_seq // apart, channels=self.dim,
            width=self.width, dtype=self.dtype,
        )  # fmt: skip

    def attention(self) -> FlashAttention2:
        """Every chunk by itself."""
        return FlashAttention2(
            batch=self.batch * (self.len_seq // self.piece()), num_heads=self.num_heads,
            len_q=self.piece(), head_dim=self.dim // self.num_heads, causal=True,
            dtype=self.dtype,
        )  # fmt: skip

    def tcn_stages(self) -> tuple[Stage, ...]:
        """The stack alone, which is what the paper times against MEGA's."""
        return tuple(Stage(f"tcn_{i}", self.convolution(i)) for i in range(self.depth))

    def stages(self) -> tuple[Stage, ...]:
        """The stack, projections, attention, output projection."""
        return (
            *self.tcn_stages(),
            Stage("project", self.linear(3 * self.dim, self.dim)),
            Stage("attend", self.attention()),
            Stage("output", self.linear(self.dim, self.dim)),
        )

    def compulsory_bytes(self) -> Num:
        """x and y, projections and taps, once each."""
        weights = self.dim * (4 * self.dim + self.depth * self.width)
        return 2 * self.token_bytes() + weights * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x and the weights."""
        d = int(self.dim)
        return {
            "x": rng.standard_normal((int(self.tokens), d)),
            "taps": rng.standard_normal((self.depth, d, int(self.width))),
            "w_in": rng.standard_normal((d, 3 * d)),
            "w_out": rng.standard_normal((d, d)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The taps at their distances, then attention, with NumPy."""
        x = inputs["x"].reshape(int(self.batch), int(self.len_seq), -1)
        for i in range(self.depth):
            y = np.zeros_like(x)
            for j in range(int(self.width)):
                back = min(j * self.dilation(i), x.shape[1])
                y[:, back:] += inputs["taps"][i][:, j] * x[:, : x.shape[1] - back]
            x = y / (1 + np.exp(-y))
        projected = x.reshape(int(self.tokens), -1) @ inputs["w_in"]
        o = self.attention().reference(self._heads(projected))["o"]
        return {"y": self._tokens(o) @ inputs["w_out"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        x = inputs["x"].reshape(int(self.batch), int(self.len_seq), -1)
        for i in range(self.depth):
            given = {"x": self._apart(x, i), "w": inputs["taps"][i]}
            x = self._together(self.convolution(i).program(machine, given)["y"], i)
        tokens = x.reshape(int(self.tokens), -1)
        projected = product(machine, self.linear(3 * self.dim, self.dim), tokens, inputs["w_in"])
        o = self.attention().program(machine, self._heads(projected))["o"]
        output = self.linear(self.dim, self.dim)
        return {"y": product(machine, output, self._tokens(o), inputs["w_out"])}

    def _apart(self, x: Values, layer: int) -> Values:
        """[batch, len_seq, dim] as [batch dilation, len_seq / dilation, dim]."""
        r, (batch, length, d) = self.dilation(layer), x.shape
        return x.reshape(batch, length // r, r, d).swapaxes(1, 2).reshape(batch * r, -1, d)

    def _together(self, x: Values, layer: int) -> Values:
        r, (rows, length, d) = self.dilation(layer), x.shape
        return x.reshape(rows // r, r, length, d).swapaxes(1, 2).reshape(rows // r, -1, d)

    def _heads(self, x: Values) -> Arrays:
        """[tokens, 3 dim] as q, k, v [chunks, heads, chunk, head_dim]."""
        shape = (-1, int(self.piece()), int(self.num_heads), int(self.dim // self.num_heads))
        parts = np.split(x, 3, axis=1)
        return {n: p.reshape(shape).swapaxes(1, 2) for n, p in zip("qkv", parts, strict=True)}

    def _tokens(self, o: Values) -> Values:
        return o.swapaxes(1, 2).reshape(int(self.tokens), -1)

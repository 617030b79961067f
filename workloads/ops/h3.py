"""The H3 layer with state passing (FlashConv, arXiv 2212.14052, sections 3 and 4).

    y = W (Q * SSM_diag(SSM_shift(K) * V)),        (Q, K, V) = W x

SSM_shift is a filter of `shift_dim` taps. SSM_diag is the convolution with k[t] = sum_s c_s a_s^t,
done by a fused FFT convolution where the sequence is no longer than `chunk`. A longer one is cut
into J pieces of N' that pass a state x of `state_dim` numbers a channel (algorithm 2):

    y_j = conv(u_j, k[:N']) + C x_j,    C[s, t] = c_s a_s^(t + 1)
    x_(j+1) = a^N' x_j + B u_j,         B[t, s] = a_s^(N' - 1 - t)

so that device memory sees every element a fixed number of times, whatever the length. Heads of
width 1 and a real diagonal, as a count; the skip connections are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import FP32
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, ceil_div, maximum, minimum, where
from workloads.op import Arrays, Stage
from workloads.ops.conv_layer import ConvLayer, mapped, product
from workloads.ops.elementwise import add, mul
from workloads.ops.flash_fft_conv import FlashFFTConv
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.short_conv import ShortConv

CHUNK = 8192
"""Tokens that one fused convolution takes on an A100, as the paper says."""


@dataclass(frozen=True, kw_only=True)
class H3(ConvLayer):
    """One H3 layer over x[batch len_seq, dim], causal.

    >>> op = H3(len_seq=2**15, dim=1024)
    >>> [int(s.times) for s in op.stages() if s.name in ("fused", "convolve", "state_out")]
    [0, 4, 3]
    >>> op.state_bytes()  # 64 taps of history and 64 states a channel, fp32
    524288.0
    """

    name: ClassVar[str] = "h3"
    cheaper: ClassVar[tuple[str, ...]] = ("chunk",)
    shift_dim: Num = 64
    state_dim: Num = 64
    chunk: Num = CHUNK

    def check(self) -> None:
        """Pieces of one size."""
        if any_true(self.len_seq % self.piece() != 0):
            raise InputError(
                f"{self.name}: chunk = {self.chunk} must divide len_seq = {self.len_seq}; pad it"
            )

    def piece(self) -> Num:
        """Tokens of one piece."""
        return minimum(self.chunk, self.len_seq)

    def num_pieces(self) -> Num:
        """Pieces that pass a state on."""
        return ceil_div(self.len_seq, self.piece())

    def state_bytes(self) -> Num:
        """What decoding keeps of a sequence, whatever its length: history and state, fp32."""
        return self.batch * self.dim * (self.shift_dim + self.state_dim) * FP32.bytes_per_element

    def shift(self) -> ShortConv:
        """SSM_shift, by its taps."""
        return ShortConv(
            batch=self.batch, len_seq=self.len_seq, channels=self.dim, width=self.shift_dim,
            dtype=self.dtype, activation=False,
        )  # fmt: skip

    def convolution(self) -> FlashFFTConv:
        """SSM_diag over one piece."""
        return FlashFFTConv(
            batch=self.batch, channels=self.dim, len_seq=self.piece(), dtype=self.dtype
        )

    def state_in(self) -> BatchedMatmul:
        """B u of one piece, for all channels."""
        return BatchedMatmul(
            batch=self.dim, m=self.batch, n=self.state_dim, k=self.piece(), dtype=self.dtype
        )

    def state_out(self) -> BatchedMatmul:
        """C x of one piece, for all channels."""
        return BatchedMatmul(
            batch=self.dim, m=self.batch, n=self.piece(), k=self.state_dim, dtype=self.dtype
        )

    def stages(self) -> tuple[Stage, ...]:
        """One fused kernel with both gates, or pieces and gates of their own."""
        pieces, states = self.num_pieces(), self.batch * self.dim * self.state_dim
        single = where(pieces > 1, 0, 1)
        passed, between = pieces - 1, maximum(pieces - 2, 0)
        elements, conv = self.tokens * self.dim, self.convolution()
        return (
            Stage("project", self.linear(3 * self.dim, self.dim)),
            Stage("shift", self.shift()),
            Stage("fused", conv.over(gated=True), single),
            Stage("gate", mul(elements, self.dtype), 2 * (1 - single)),
            Stage("convolve", conv, pieces * (1 - single)),
            Stage("state_in", self.state_in(), passed),
            Stage("state_out", self.state_out(), passed),
            Stage("join", add(self.batch * self.dim * self.piece(), self.dtype), passed),
            Stage("decay", mul(states, self.dtype), between),
            Stage("accumulate", add(states, self.dtype), between),
            Stage("output", self.linear(self.dim, self.dim)),
        )

    def compulsory_bytes(self) -> Num:
        """x and y, both projections and the taps, once each."""
        weights = self.dim * (4 * self.dim + self.shift_dim)
        return 2 * self.token_bytes() + weights * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, the weights, the taps, and c, a of the diagonal system."""
        d, s = int(self.dim), int(self.state_dim)
        return {
            "x": rng.standard_normal((int(self.tokens), d)),
            "w_in": rng.standard_normal((d, 3 * d)),
            "taps": rng.standard_normal((d, int(self.shift_dim))),
            "a": rng.uniform(0.5, 0.99, (d, s)),
            "c": rng.standard_normal((d, s)),
            "w_out": rng.standard_normal((d, d)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The recurrence of the states, token by token."""
        q, k, v = (self.by_channel(x) for x in np.split(inputs["x"] @ inputs["w_in"], 3, axis=1))
        short = {"x": k.swapaxes(1, 2), "w": inputs["taps"]}
        u = self.shift().reference(short)["y"].swapaxes(1, 2) * v
        state, y = np.zeros((*u.shape[:2], int(self.state_dim))), np.empty_like(u)
        for t in range(u.shape[2]):
            state = inputs["a"] * state + u[:, :, t, None]
            y[:, :, t] = (inputs["c"] * state).sum(axis=2)
        return {"y": self.by_token(q * y) @ inputs["w_out"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        project, output = self.linear(3 * self.dim, self.dim), self.linear(self.dim, self.dim)
        projected = product(machine, project, inputs["x"], inputs["w_in"])
        q, k, v = (self.by_channel(x) for x in np.split(projected, 3, axis=1))
        short = {"x": k.swapaxes(1, 2), "w": inputs["taps"]}
        shifted = self.shift().program(machine, short)["y"].swapaxes(1, 2)
        if int(self.num_pieces()) == 1:
            taps = self._powers(inputs)["taps"]
            fused = {"u": shifted, "w": v, "v": q, "k": taps}
            y = self.convolution().over(gated=True).program(machine, fused)["y"]
        else:
            gate = mul(self.tokens * self.dim, self.dtype)
            u = mapped(machine, gate, shifted, v)
            y = mapped(machine, gate, self._pieces(machine, u, self._powers(inputs)), q)
        return {"y": product(machine, output, self.by_token(y), inputs["w_out"])}

    def _powers(self, inputs: Arrays) -> Mapping[str, Values]:
        """Taps of one piece, C, B and the decay over a piece: weights, made once."""
        a, c = inputs["a"], inputs["c"]
        grown = a[:, :, None] ** np.arange(int(self.piece()) + 1)
        return {
            "taps": (c[:, :, None] * grown[:, :, :-1]).sum(axis=1),
            "out": c[:, :, None] * grown[:, :, 1:],
            "in": grown[:, :, -2::-1].swapaxes(1, 2),
            "decay": grown[:, :, -1],
        }

    def _pieces(self, mc: Machine, u: Values, powers: Mapping[str, Values]) -> Values:
        """The convolution piece by piece, the state handed on, [channels, batch, states]."""
        parts = np.split(u, int(self.num_pieces()), axis=2)
        states = self.batch * self.dim * self.state_dim
        state: Values | None = None
        done: list[Values] = []
        for j, part in enumerate(parts):
            y = self.convolution().program(mc, {"u": part, "k": powers["taps"]})["y"]
            if state is not None:
                more = product(mc, self.state_out(), state, powers["out"]).swapaxes(0, 1)
                y = mapped(mc, add(more.size, self.dtype), y, more)
            done.append(y)
            if j == len(parts) - 1:
                break
            new = product(mc, self.state_in(), part.swapaxes(0, 1), powers["in"])
            if state is not None:
                decay = np.broadcast_to(powers["decay"][:, None], state.shape)
                kept = mapped(mc, mul(states, self.dtype), state, decay)
                new = mapped(mc, add(states, self.dtype), kept, new)
            state = new
        return np.concatenate(done, axis=2)

"""What stands in the place of attention: scans with a state, short convolutions, as sizes.

A layer of width d has, instead of attention,

    mamba2   z, xBC, dt = u W_in;  x, B, C = silu(conv(xBC));  y = ssd(x, dt, B, C);
             out = RMSNorm(y silu(z)) W_out
             H heads of P, G groups of N states; i = H P       (Dao and Gu 2024, arXiv 2405.21060)
    mamba    x, z = u W_in;  x = silu(conv(x));  dt, B, C = x W_x;  dt = dt W_dt;
             out = (scan(x, dt, B, C) silu(z)) W_out
             i channels of N states, dt of rank R              (Gu and Dao 2023, arXiv 2312.00752)
    delta    q, k, v, z = u W_in;  b, a = u W_ba;  q, k, v = silu(conv(q, k, v));
             out = (RMSNorm(gated_delta_rule(q, k, v, a, b)) silu(z)) W_out
                                                               (Yang et al. 2024, arXiv 2412.06464)
    conv     B, C, x = u W_in;  out = (C conv(B x)) W_out      (LFM2's short convolution)

Parameters are those of the modules in Hugging Face transformers: `Mamba2Mixer` and `BambaMixer`,
`MambaMixer` and `JambaMambaMixer`, `Qwen3NextGatedDeltaNet`, `Lfm2ShortConv`.

Tensor parallelism splits heads or channels: W_in by columns, the taps, the scalars of a head and
the norm with them, W_out by rows. Groups (keys of a delta rule) are copied where there are more
ranks than groups. Mamba's W_x is split by rows, so that its narrow output is summed over the ranks;
its norms of dt, B and C are on every rank. The norm of mamba2 is then over a rank's part, as
Megatron Core has it.

Implemented in: `matrices`, `small` (parameters), `kept` (what the backward pass needs), `states`
(what decoding keeps), `flops_per_token`; the ops are `mixer_layer`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

from hwmodels.errors import InputError
from workloads.models.projection import Projection, heads_per_rank
from workloads.numeric import Num, ceil_div

INVERSE_CHUNK = 64
"""Tokens of a chunk whose inverse a gated delta rule keeps: fla's chunk_gated_delta_rule."""
FLOPS_PER_MAC = 2


class Kept(NamedTuple):
    """A tensor kept for the backward pass: numbers a token on one rank; `wide` ones are fp32."""

    name: str
    elements: Num
    wide: bool = False


class States(NamedTuple):
    """What one sequence leaves behind on one rank: numbers of the scan, inputs of convolutions."""

    scan: Num
    conv: Num


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixer(ABC):
    """What all of them have: a short convolution of `width` taps a channel."""

    label: ClassVar[str]
    width: int = 4
    conv_bias: bool = True
    bias: bool = False

    @property
    @abstractmethod
    def num_parts(self) -> int:
        """Heads or channels that tensor parallelism shares out."""

    @abstractmethod
    def conv_channels(self, tp: Num = 1) -> Num:
        """Channels of the convolution on one rank."""

    @abstractmethod
    def matrices(self, hidden: int, tp: Num = 1) -> tuple[Projection, ...]:
        """The projections on one of `tp` ranks."""

    @abstractmethod
    def scalars(self, tp: Num = 1) -> Num:
        """Parameters that are neither in a projection nor in the convolution."""

    @abstractmethod
    def kept(self, tp: Num = 1) -> tuple[Kept, ...]:
        """Between the projections' input and the last of them, in the order they are made."""

    @abstractmethod
    def states(self, tp: Num = 1) -> States:
        """Of one sequence on one rank."""

    @abstractmethod
    def scan_flops(self) -> int:
        """Of the recurrence for a token: each number of a state is met so many times."""

    def small(self, tp: Num = 1) -> Num:
        """Taps, their biases, and the scalars."""
        return self.conv_channels(tp) * (self.width + self.conv_bias) + self.scalars(tp)

    def flops_per_token(self) -> int:
        """Recurrence and taps of the whole layer: what a token needs beside the projections."""
        return self.scan_flops() + FLOPS_PER_MAC * self.width * int(self.conv_channels())

    def reduced_elements(self) -> int:
        """Numbers of a token that tensor-parallel ranks sum inside the mixer."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2(_Mixer):
    """Mamba-2's mixer; `groups` of heads share B and C.

    >>> one = Mamba2(num_heads=128, head_dim=64, num_groups=8, state_dim=128, conv_bias=False)
    >>> sum(m.num_parameters for m in one.matrices(4096)) + one.small() - 3 * 128
    109625344
    """

    label: ClassVar[str] = "mamba2"
    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.num_heads % self.num_groups:
            raise InputError(
                f"{self.num_groups} groups of a Mamba-2 mixer do not divide its {self.num_heads} "
                "heads; give a divisor"
            )

    @property
    def num_parts(self) -> int:
        """Heads."""
        return self.num_heads

    def shape(self, tp: Num = 1) -> tuple[Num, Num]:
        """Heads and groups of a rank."""
        return heads_per_rank(self.num_heads, self.num_groups, tp)

    def inner(self, tp: Num = 1) -> Num:
        """Width of x, y and z on a rank."""
        return self.shape(tp)[0] * self.head_dim

    def conv_channels(self, tp: Num = 1) -> Num:
        """x, B and C."""
        return self.inner(tp) + 2 * self.shape(tp)[1] * self.state_dim

    def matrices(self, hidden: int, tp: Num = 1) -> tuple[Projection, ...]:
        """To z, x, B, C, dt; back."""
        inner = self.inner(tp)
        columns = inner + self.conv_channels(tp) + self.shape(tp)[0]
        return (
            Projection(name="in", k=hidden, n=columns, bias=self.bias),
            Projection(name="out", k=inner, n=hidden, bias=self.bias),
        )

    def scalars(self, tp: Num = 1) -> Num:
        """A, D and the bias of dt of a head; the norm."""
        return 3 * self.shape(tp)[0] + self.inner(tp)

    def kept(self, tp: Num = 1) -> tuple[Kept, ...]:
        """States of the chunks are made again by the scan's backward pass."""
        inner, channels = self.inner(tp), self.conv_channels(tp)
        return (
            Kept("z", inner),
            Kept("conv.input", channels),
            Kept("dt", self.shape(tp)[0]),
            Kept("scan.input", channels),
            Kept("scan.output", inner),
            Kept("norm.input", inner),
            Kept("output", inner),
        )

    def states(self, tp: Num = 1) -> States:
        """N x P a head."""
        conv = self.conv_channels(tp) * (self.width - 1)
        return States(self.inner(tp) * self.state_dim, conv)

    def scan_flops(self) -> int:
        """Update and output, N P products each."""
        return 4 * self.num_heads * self.head_dim * self.state_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba(_Mixer):
    """Mamba's mixer over `channels`; `inner_norms` are on dt, B and C, with or without a scale."""

    label: ClassVar[str] = "mamba"
    channels: int
    state_dim: int
    dt_rank: int
    inner_norms: bool = False
    norm_scales: bool = True

    @property
    def num_parts(self) -> int:
        """Channels."""
        return self.channels

    @property
    def narrow(self) -> int:
        """Columns of W_x: dt of low rank, B and C."""
        return self.dt_rank + 2 * self.state_dim

    def conv_channels(self, tp: Num = 1) -> Num:
        """x."""
        return ceil_div(self.channels, tp)

    def matrices(self, hidden: int, tp: Num = 1) -> tuple[Projection, ...]:
        """To x and z; to dt, B, C; dt to the channels; back."""
        inner = self.conv_channels(tp)
        return (
            Projection(name="in", k=hidden, n=2 * inner, bias=self.bias),
            Projection(name="x", k=inner, n=self.narrow),
            Projection(name="dt", k=self.dt_rank, n=inner, bias=True),
            Projection(name="out", k=inner, n=hidden, bias=self.bias),
        )

    def scalars(self, tp: Num = 1) -> Num:
        """A of a channel and state, D of a channel, the scales of the norms."""
        norms = self.narrow if self.inner_norms and self.norm_scales else 0
        return self.conv_channels(tp) * (self.state_dim + 1) + norms

    def kept(self, tp: Num = 1) -> tuple[Kept, ...]:
        """The states between chunks of the scan, one in 2048 tokens, are left out."""
        inner = self.conv_channels(tp)
        normed = (Kept("inner_norm.input", self.narrow),) if self.inner_norms else ()
        return (
            Kept("conv.input", inner),
            Kept("z", inner),
            Kept("x", inner),
            *normed,
            Kept("dt_b_c", self.narrow),
            Kept("dt", inner),
            Kept("scan.output", inner),
            Kept("output", inner),
        )

    def states(self, tp: Num = 1) -> States:
        """N a channel."""
        inner = self.conv_channels(tp)
        return States(inner * self.state_dim, inner * (self.width - 1))

    def scan_flops(self) -> int:
        """Update and output, N products each a channel."""
        return 4 * self.channels * self.state_dim

    def reduced_elements(self) -> int:
        """dt of low rank, B and C: W_x is split by rows."""
        return self.narrow


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta(_Mixer):
    """A gated delta net: `num_heads` value heads share the keys and queries of `num_key_heads`."""

    label: ClassVar[str] = "delta"
    conv_bias: bool = False
    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_key_heads:
            raise InputError(
                f"{self.num_key_heads} key heads of a gated delta net do not divide its "
                f"{self.num_heads} value heads; give a divisor"
            )

    @property
    def num_parts(self) -> int:
        """Value heads."""
        return self.num_heads

    def shape(self, tp: Num = 1) -> tuple[Num, Num]:
        """Value heads and key heads of a rank."""
        return heads_per_rank(self.num_heads, self.num_key_heads, tp)

    def values(self, tp: Num = 1) -> Num:
        """Width of v, z and the output."""
        return self.shape(tp)[0] * self.value_dim

    def conv_channels(self, tp: Num = 1) -> Num:
        """q, k and v."""
        return 2 * self.shape(tp)[1] * self.key_dim + self.values(tp)

    def matrices(self, hidden: int, tp: Num = 1) -> tuple[Projection, ...]:
        """To q, k, v and z; to the step and the decay of a head; back."""
        values = self.values(tp)
        return (
            Projection(name="in", k=hidden, n=self.conv_channels(tp) + values, bias=self.bias),
            Projection(name="gates", k=hidden, n=2 * self.shape(tp)[0], bias=self.bias),
            Projection(name="out", k=values, n=hidden, bias=self.bias),
        )

    def scalars(self, tp: Num = 1) -> Num:
        """A and the bias of dt of a head; one norm for all heads, on every rank."""
        return 2 * self.shape(tp)[0] + self.value_dim

    def kept(self, tp: Num = 1) -> tuple[Kept, ...]:
        """The inverse of every chunk is kept; states of chunks are made again."""
        heads, values, channels = self.shape(tp)[0], self.values(tp), self.conv_channels(tp)
        return (
            Kept("conv.input", channels),
            Kept("z", values),
            Kept("gates", 2 * heads),
            Kept("scan.input", channels),
            Kept("decay_and_step", 2 * heads, wide=True),
            Kept("inverses", INVERSE_CHUNK * heads),
            Kept("scan.output", values),
            Kept("gate.input", values),
            Kept("output", values),
        )

    def states(self, tp: Num = 1) -> States:
        """key_dim x value_dim a value head."""
        return States(self.values(tp) * self.key_dim, self.conv_channels(tp) * (self.width - 1))

    def scan_flops(self) -> int:
        """S k, the update and S q."""
        return 6 * self.num_heads * self.key_dim * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedConv(_Mixer):
    """A short convolution of `channels` between two gates; no activation."""

    label: ClassVar[str] = "conv"
    width: int = 3
    conv_bias: bool = False
    channels: int

    @property
    def num_parts(self) -> int:
        """Channels."""
        return self.channels

    def conv_channels(self, tp: Num = 1) -> Num:
        """All of them."""
        return ceil_div(self.channels, tp)

    def matrices(self, hidden: int, tp: Num = 1) -> tuple[Projection, ...]:
        """To both gates and x; back."""
        inner = self.conv_channels(tp)
        return (
            Projection(name="in", k=hidden, n=3 * inner, bias=self.bias),
            Projection(name="out", k=inner, n=hidden, bias=self.bias),
        )

    def scalars(self, tp: Num = 1) -> Num:
        """None."""
        return 0

    def kept(self, tp: Num = 1) -> tuple[Kept, ...]:
        """Both gates, x, and what they make of each other."""
        inner = self.conv_channels(tp)
        return (
            Kept("gates_and_x", 3 * inner),
            Kept("conv.input", inner),
            Kept("conv.output", inner),
            Kept("output", inner),
        )

    def states(self, tp: Num = 1) -> States:
        """The last inputs of the convolution alone."""
        return States(0, self.conv_channels(tp) * (self.width - 1))

    def scan_flops(self) -> int:
        """No recurrence."""
        return 0


AnyMixer: TypeAlias = Mamba2 | Mamba | GatedDelta | GatedConv


def no_context(name: str, mixer: AnyMixer) -> str:
    """Why the ranks of a sequence cannot share such a layer."""
    return (
        f"{name}: its {mixer.label} layers hand a state from token to token, and splitting a "
        "sequence over cp ranks is not modelled for them; give cp = 1"
    )

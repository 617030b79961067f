"""A Mamba-2 layer: projections, a short convolution, the scan and a gated norm around it.

    z, x, B, C, dt = u W_in
    x, B, C        = silu(conv(x, B, C))
    y              = RMSNorm(scan(x, dt, B, C) silu(z))
    out            = y W_out

(Dao and Gu 2024, arXiv 2405.21060, section 7.1 and figure 6), over a prompt or for one new token a
sequence from held states. Counts per token, d the model's width, i the inner one, H heads, G groups
of state_dim N, head_dim P:

    products   2 d (2 i + 2 G N + H) + 2 i d,   and the scan's
    states     H N P, and `width` - 1 inputs of each of i + 2 G N channels of the convolution

The layers of Mamba-2-Hybrid (Waleffe et al. 2024, arXiv 2406.07887, section 2) have d = 4096,
i = 8192, G = 8, N = 128, P = 64. The norm is taken over all of i; over each group apart it has
other statistics and the same counts but for those. Ignored: the norm before the layer, the residual
stream, the biases of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, ceil_div
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.elementwise import Elementwise, silu_mul
from workloads.ops.matmul import Matmul
from workloads.ops.norm import RmsNorm
from workloads.ops.short_conv import ShortConv
from workloads.ops.ssd_scan import FP32_BYTES, SsdScan, SsdStep
from workloads.ops.staged import Step, SteppedOp


@dataclass(frozen=True, kw_only=True)
class StateSpaceLayer(SteppedOp):
    """What layers around a scan share: u[batch, len_seq, dim], `dim` half the inner width."""

    batch: Num = 1
    len_seq: Num
    num_heads: Num
    dim: Num | None = None
    head_dim: Num = 64
    state_dim: Num = 128
    num_groups: Num = 1
    width: Num = 4
    chunk: int = 64
    dtype: DType = BF16

    @property
    def inner(self) -> Num:
        """Width of x, y and z."""
        return self.num_heads * self.head_dim

    @property
    def model_dim(self) -> Num:
        """`dim`, else half the inner width."""
        return ceil_div(self.inner, 2) if self.dim is None else self.dim

    @property
    def tokens(self) -> Num:
        """Rows of the layer's input."""
        return self.batch * self.len_seq

    def linear(self, cols: Num, inner: Num) -> Matmul:
        """A projection of every token."""
        return Matmul(m=self.tokens, n=cols, k=inner, dtype=self.dtype)

    def norm(self) -> RmsNorm:
        """Of every token's inner width."""
        return RmsNorm(rows=self.tokens, cols=self.inner, dtype=self.dtype)

    def gate(self) -> Elementwise:
        """silu(z) times the other branch."""
        return silu_mul(self.tokens * self.inner, self.dtype)

    def gated(self, step: Step, z: Values, y: Values) -> Values:
        """y silu(z)."""
        given = {"x0": np.ascontiguousarray(z).reshape(-1), "x1": y.reshape(-1)}
        return step(self.gate(), given)["y0"].reshape(y.shape)

    def normed(self, step: Step, y: Values, weight: Values) -> Values:
        """RMSNorm of the rows."""
        rows = y.reshape(int(self.tokens), int(self.inner))
        return step(self.norm(), {"x": rows, "weight": weight})["y"].reshape(y.shape)


def projected(step: Step, op: ProvedOp, x: Values, weight: Values) -> Values:
    """x[..., k] times weight[k, n]."""
    flat = x.reshape(1, -1, x.shape[-1])
    return step(op, {"a": flat, "b": weight[None]})["c"].reshape(*x.shape[:-1], -1)


@dataclass(frozen=True, kw_only=True)
class Mamba2Layer(StateSpaceLayer):
    """One layer over a prompt; with `update` one new token a sequence (len_seq = 1).

    `state_dtype` is the format of the scan's states; the convolution's have that of activations.

    >>> op = Mamba2Layer(len_seq=1, num_heads=128, num_groups=8, update=True)
    >>> op.weights() == 4096 * (2 * 8192 + 2048 + 128) + 8192 * 4096 + 4 * 10240 + 8192
    True
    >>> op.state_bytes() / 2**20      # 128 x 128 x 64 numbers in fp32, 3 x 10240 in bf16
    4.05859375
    """

    name: ClassVar[str] = "mamba2_layer"
    update: bool = False
    state_dtype: DType = FP32

    def check(self) -> None:
        """An update is one step; groups divide the heads."""
        if self.update and any_true(self.len_seq != 1):
            raise InputError(f"{self.name}: an update makes one step; give len_seq = 1")
        self.scan()

    @property
    def shared_cols(self) -> Num:
        """Columns of B, or of C."""
        return self.num_groups * self.state_dim

    @property
    def conv_channels(self) -> Num:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.shared_cols

    def scan(self) -> SsdScan | SsdStep:
        """The recurrence."""
        shape = {
            "batch": self.batch, "num_heads": self.num_heads, "num_groups": self.num_groups,
            "head_dim": self.head_dim, "state_dim": self.state_dim,
        }  # fmt: skip
        formats = {"dtype": self.dtype, "state_dtype": self.state_dtype}
        if self.update:
            return SsdStep(**shape, **formats)  # type: ignore[arg-type]
        return SsdScan(**shape, **formats, len_seq=self.len_seq, chunk=self.chunk)  # type: ignore[arg-type]

    def kernels(self) -> dict[str, ProvedOp]:
        """All stages by name, in the order they run."""
        d, i = self.model_dim, self.inner
        return {
            "project": self.linear(i + self.conv_channels + self.num_heads, d),
            "convolve": ShortConv(
                batch=self.batch, len_seq=self.len_seq, channels=self.conv_channels,
                width=self.width, dtype=self.dtype, update=self.update,
            ),
            "scan": self.scan(),
            "gate": self.gate(),
            "norm": self.norm(),
            "output": self.linear(d, i),
        }  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Every kernel once."""
        return tuple(Stage(name, op) for name, op in self.kernels().items())

    def weights(self) -> Num:
        """Numbers of both projections, the taps and the norm."""
        columns = self.inner + self.conv_channels + self.num_heads
        taps = self.conv_channels * self.width
        return self.model_dim * (columns + self.inner) + taps + self.inner

    def state_bytes(self) -> Num:
        """What decoding keeps: the scan's states and the last inputs of the convolution."""
        kept = self.batch * self.conv_channels * (self.width - 1) * self.dtype.bytes_per_element
        return self.scan().state_bytes() + kept

    def compulsory_bytes(self) -> Num:
        """Input, output and weights once; states written, by an update also read."""
        e = self.dtype.bytes_per_element
        moved = (2 * self.tokens * self.model_dim + self.weights()) * e
        numbers = 3 * self.num_heads * FP32_BYTES
        states = 2 * self.state_bytes() if self.update else self.scan().state_bytes()
        return moved + numbers + states

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """u[batch, len_seq, dim], the weights, and the states of an update."""
        ops, d, i = self.kernels(), int(self.model_dim), int(self.inner)
        shape = (int(self.batch), int(self.len_seq), d)
        heads, channels = int(self.num_heads), int(self.conv_channels)
        found = {
            "u": rng.standard_normal(shape),
            "project": rng.standard_normal((d, i + channels + heads)) / d**0.5,
            "taps": rng.standard_normal((channels, int(self.width))),
            "weight": rng.standard_normal(i),
            "output": rng.standard_normal((i, d)) / i**0.5,
        } | self.scan().head_inputs(rng)
        if self.update:
            for name, kernel in (("before", "convolve"), ("state", "scan")):
                found[name] = ops[kernel].inputs(rng)["state"]
        return found

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Stage by stage; an update hands the states on."""
        ops, i = self.kernels(), int(self.inner)
        columns = projected(step, ops["project"], inputs["u"], inputs["project"])
        z, xbc, dt = np.split(columns, [i, i + int(self.conv_channels)], axis=-1)
        held = {"state": inputs["before"]} if self.update else {}
        mixed = step(ops["convolve"], {"x": xbc, "w": inputs["taps"]} | held)
        scanned = step(ops["scan"], self._scanned(mixed["y"], dt, inputs))
        y = self.gated(step, z, scanned["y"].reshape(z.shape))
        y = self.normed(step, y, inputs["weight"])
        found = {"y": projected(step, ops["output"], y, inputs["output"])}
        found["state"] = scanned["state"]
        return found | ({"before": mixed["state"]} if self.update else {})

    def _scanned(self, xbc: Values, dt: Values, inputs: Arrays) -> dict[str, Values]:
        """What the scan reads, in its shapes; an update's without the axis of tokens."""
        i, shared = int(self.inner), int(self.shared_cols)
        x, b, c = np.split(xbc, [i, i + shared], axis=-1)
        groups = (int(self.num_groups), int(self.state_dim))
        found = {
            "x": x.reshape(*x.shape[:2], int(self.num_heads), int(self.head_dim)),
            "dt": dt,
            "b": b.reshape(*b.shape[:2], *groups),
            "c": c.reshape(*c.shape[:2], *groups),
        }
        if self.update:
            found = {name: values[:, 0] for name, values in found.items()}
            found["state"] = inputs["state"]
        return found | {name: inputs[name] for name in ("a", "bias", "d")}

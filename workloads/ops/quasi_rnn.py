"""LSTM layers of several heads: step by step, and the quasi-LSTM whose gates see the input alone.

Stanic et al. 2023 (Languini Kitchen, arXiv 2309.11197, section 4.2 and its published code). With
pre-activations x_f, x_i, x_z, x_o = W x + b of all tokens, heads of width d_h, forget bias 1:

    LSTM          f, i, o = sigmoid(x + U h_{t-1}),  z = tanh(x_z + U_z h_{t-1})
    quasi-LSTM    the same without U
    both          c_t = f c_{t-1} + i z,   h_t = o tanh(c_t),   y = W_o h

The LSTM multiplies len_seq times [batch heads, d_h] by U[d_h, 4 d_h], shared by the heads, one step
after the other. Without U the recurrence of c is element-wise: all products are over all tokens at
once, and (f, i z) is scanned in blocks of `block_length` tokens in parallel, block after block.
The published code forms the block_length x (block_length + 1) matrix of decay products instead of
a scan; that is a constant factor of element-wise work.

Ignored: biases, norms and the feed-forward layer around the cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true
from workloads.op import Arrays, Stage
from workloads.ops.associative_scan import KOGGE_STONE, AssociativeScan
from workloads.ops.cell_map import CellMap, cell_output, lstm_cell, quasi_gates
from workloads.ops.matmul import Matmul
from workloads.ops.staged import Step, SteppedOp

GATES = 4
FP32_BYTES = FP32.bits // 8


@dataclass(frozen=True, kw_only=True)
class _CellLayer(SteppedOp):
    """x[batch len_seq, dim] to y of that shape through `num_heads` cells of `head_dim`."""

    batch: Num = 1
    len_seq: Num
    dim: Num
    num_heads: Num = 1
    head_dim: Num
    dtype: DType = BF16

    @property
    def tokens(self) -> Num:
        """Rows of the layer's input."""
        return self.batch * self.len_seq

    @property
    def width(self) -> Num:
        """Cells of all heads."""
        return self.num_heads * self.head_dim

    def state_bytes(self) -> Num:
        """c and h of all cells in fp32: what decoding keeps, one token being len_seq = 1."""
        return 2 * self.batch * self.width * FP32_BYTES

    def projection(self) -> Matmul:
        """The input's part of all gates."""
        return Matmul(
            m=self.tokens, n=GATES * self.width, k=self.dim, dtype=self.dtype, out_dtype=FP32
        )

    def output(self) -> Matmul:
        """Heads back to the model's dimension."""
        return Matmul(m=self.tokens, n=self.dim, k=self.width, dtype=self.dtype)

    def weights(self) -> Num:
        """Parameters of both projections."""
        return (GATES + 1) * self.dim * self.width

    def compulsory_bytes(self) -> Num:
        """x and y, all weights, once each."""
        return (2 * self.tokens * self.dim + self.weights()) * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, the gates' weights [dim, 4 width] (f, i, z, o side by side), the output's."""
        dim, width = int(self.dim), int(self.width)
        return {
            "x": 2 * rng.standard_normal((int(self.tokens), dim)),
            "w_in": rng.standard_normal((dim, GATES * width)),
            "w_out": rng.standard_normal((width, dim)),
        }

    def _gates(self, step: Step, inputs: Arrays) -> list[Values]:
        """f, i, z, o of the input, each [tokens, width]."""
        given = {"a": inputs["x"][None], "b": inputs["w_in"][None]}
        return np.split(step(self.projection(), given)["c"][0], GATES, axis=1)

    def _projected(self, step: Step, inputs: Arrays, h: Values) -> Arrays:
        given = {"a": h.reshape(1, int(self.tokens), -1), "b": inputs["w_out"][None]}
        return {"y": step(self.output(), given)["c"][0]}


@dataclass(frozen=True, kw_only=True)
class QuasiLstm(_CellLayer):
    """The quasi-LSTM: projections over all tokens, gates, a scan, output.

    >>> op = QuasiLstm(batch=8, len_seq=512, dim=768, num_heads=12, head_dim=64)
    >>> op.work(2**18).tensor_flops[BF16] == 2 * 8 * 512 * 5 * 768 * 768
    True
    >>> op.work(2**18).launches
    5
    """

    name: ClassVar[str] = "quasi_lstm"
    cheaper: ClassVar[tuple[str, ...]] = ("block_length",)
    block_length: Num = 16

    def check(self) -> None:
        """Blocks that come out even, as the published code has them."""
        if any_true(self.len_seq % self.block_length != 0) and any_true(
            np.greater(self.len_seq, self.block_length)
        ):
            raise InputError(
                f"{self.name}: block_length = {np.max(self.block_length):g} must divide len_seq = "
                f"{np.max(self.len_seq):g}; pad the sequence"
            )

    def gate(self) -> CellMap:
        """Decay f and drive i z."""
        return quasi_gates(self.tokens * self.width, FP32)

    def scan(self) -> AssociativeScan:
        """Of all cells, in blocks of tokens."""
        return AssociativeScan(
            batch=self.batch, len_seq=self.len_seq, width=self.width,
            chunk=self.block_length, algorithm=KOGGE_STONE,
        )  # fmt: skip

    def emit(self) -> CellMap:
        """h of all tokens."""
        return cell_output(self.tokens * self.width, FP32, self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """Everything over all tokens."""
        return (
            Stage("project", self.projection()),
            Stage("gate", self.gate()),
            Stage("scan", self.scan()),
            Stage("emit", self.emit()),
            Stage("output", self.output()),
        )

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """The stages in turn."""
        f, i, z, o = self._gates(step, inputs)
        made = step(self.gate(), _flat(f, i, z))
        shape = (int(self.batch), int(self.len_seq), -1)
        pairs = {"v0": made["y0"].reshape(shape), "v1": made["y1"].reshape(shape)}
        c = step(self.scan(), pairs)["v1"]
        h = step(self.emit(), _flat(o, c))["y0"]
        return self._projected(step, inputs, h)


@dataclass(frozen=True, kw_only=True)
class Lstm(_CellLayer):
    """The LSTM: its state's part of the gates is a product and a kernel more for every step.

    >>> op = Lstm(batch=8, len_seq=512, dim=768, num_heads=12, head_dim=64)
    >>> op.work(2**18).launches == 2 + 2 * 512
    True
    """

    name: ClassVar[str] = "lstm_layer"

    def recurrent(self) -> Matmul:
        """One step's product with U, heads as rows."""
        return Matmul(
            m=self.batch * self.num_heads, n=GATES * self.head_dim, k=self.head_dim,
            dtype=self.dtype, out_dtype=FP32,
        )  # fmt: skip

    def cell(self) -> CellMap:
        """One step's gates and states."""
        return lstm_cell(self.batch * self.width, FP32)

    def weights(self) -> Num:
        """U besides the projections."""
        return (GATES + 1) * self.dim * self.width + GATES * self.head_dim**2

    def stages(self) -> tuple[Stage, ...]:
        """The step's two kernels as often as there are tokens."""
        return (
            Stage("project", self.projection()),
            Stage("recur", self.recurrent(), self.len_seq),
            Stage("cell", self.cell(), self.len_seq),
            Stage("output", self.output()),
        )

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """U[head_dim, 4 head_dim] besides."""
        d = int(self.head_dim)
        return {**super().inputs(rng), "u": rng.standard_normal((d, GATES * d)) / np.sqrt(d)}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Token after token."""
        batch, heads, d = int(self.batch), int(self.num_heads), int(self.head_dim)
        shape = (batch, int(self.len_seq), heads * d)
        gates = [gate.reshape(shape) for gate in self._gates(step, inputs)]
        c, h, made = np.zeros(batch * heads * d), np.zeros(batch * heads * d), []
        for t in range(shape[1]):
            given = {"a": h.reshape(1, batch * heads, d), "b": inputs["u"][None]}
            again = np.split(step(self.recurrent(), given)["c"][0], GATES, axis=1)
            states = step(self.cell(), _flat(*(gate[:, t] for gate in gates), *again, c))
            c, h = states["y0"], states["y1"]
            made.append(h.reshape(batch, -1))
        return self._projected(step, inputs, np.stack(made, axis=1))


def lstm_steps(op: _CellLayer) -> Lstm:
    """The LSTM of a quasi-LSTM's sizes."""
    return Lstm(
        batch=op.batch, len_seq=op.len_seq, dim=op.dim, num_heads=op.num_heads,
        head_dim=op.head_dim, dtype=op.dtype,
    )  # fmt: skip


def _flat(*arrays: Values) -> Mapping[str, Values]:
    return {f"x{i}": np.ascontiguousarray(x).reshape(-1) for i, x in enumerate(arrays)}

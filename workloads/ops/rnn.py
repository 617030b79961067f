"""Recurrent layers as libraries run them: the recurrent products, one time step after the other.

With G gates (vanilla 1, GRU 3, LSTM 4), hidden size h, batch b and t steps, every direction
multiplies 2 G h^2 b t flops:

    fwd         h_i = f(W h_(i-1) + ...)      t products [G h, h] [h, b], in sequence
    bwd_data    the same with W transposed    t products [h, G h] [G h, b], in sequence
    bwd_weight  dW = sum_i dz_i h_(i-1)^T     one product [G h, b t] [b t, h]
    bwd_all     bwd_data, then bwd_weight

The products of the layer's input are not counted: published benchmarks feed it directly. Pointwise
work: 1, 3 and 5 special functions per hidden unit and step. Weights are counted once, as a
persistent kernel would read them; what a library reads again each step is for its time to tell.
Source: Hochreiter and Schmidhuber 1997 (LSTM), Cho et al. 2014 (GRU); Appleyard et al. 2016,
arXiv 1604.01946 (how cuDNN runs them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import UnknownNameError
from workloads.numeric import Num
from workloads.op import Op
from workloads.work import Work

GATES: Final[Mapping[str, int]] = {"vanilla": 1, "gru": 3, "lstm": 4}
SPECIAL_OPS: Final[Mapping[str, int]] = {"vanilla": 1, "gru": 3, "lstm": 5}
DIRECTIONS: Final = ("fwd", "bwd_data", "bwd_weight", "bwd_all")


@dataclass(frozen=True, kw_only=True)
class Rnn(Op):
    """One recurrent layer; it stores in `dtype` and multiplies in `math_dtype` (else the same).

    >>> op = Rnn(cell="lstm", hidden=512, batch=16, num_steps=25)
    >>> op.flops() == 2 * 4 * 512**2 * 16 * 25, op.weight_bytes() == 4 * 512**2 * 4
    (True, True)
    """

    name: ClassVar[str] = "rnn"
    cell: str = "lstm"
    hidden: Num
    batch: Num
    num_steps: Num
    direction: str = "fwd"
    dtype: DType = FP32
    math_dtype: DType | None = None

    def check(self) -> None:
        """A known cell and direction."""
        for label, value, known in (
            ("cell", self.cell, GATES),
            ("direction", self.direction, DIRECTIONS),
        ):
            if value not in known:
                raise UnknownNameError(f"rnn {label}", value, list(known))

    @property
    def gates(self) -> int:
        """Products per hidden unit."""
        return GATES[self.cell]

    @property
    def num_products(self) -> int:
        """2 where data and weight gradients follow each other."""
        return 2 if self.direction == "bwd_all" else 1

    def flops(self) -> Num:
        """2 G h^2 b t flops a direction."""
        return 2 * self.gates * self.hidden**2 * self.batch * self.num_steps * self.num_products

    def weight_bytes(self) -> Num:
        """The recurrent weights."""
        return self.gates * self.hidden**2 * self.dtype.bytes_per_element

    def state_bytes(self) -> Num:
        """Hidden states of all steps, once."""
        return self.hidden * self.batch * self.num_steps * self.dtype.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """Weights once, gate values in or out, hidden states out or in."""
        return self.num_products * (self.weight_bytes() + (1 + self.gates) * self.state_bytes())

    def work(self, fast_bytes: Num) -> Work:
        """Everything once: the least any kernel does."""
        written = self.weight_bytes() if self.direction == "bwd_weight" else self.state_bytes()
        written = written * self.num_products
        units = self.hidden * self.batch * self.num_steps
        return Work(
            tensor_flops={self.math_dtype or self.dtype: self.flops()},
            vector_flops=2 * self.gates * units,
            special_ops=0 if self.direction == "bwd_weight" else SPECIAL_OPS[self.cell] * units,
            read_bytes=self.compulsory_bytes() - written,
            write_bytes=written,
            launches=self.num_products,
        )

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice of tile is counted."""
        return {}

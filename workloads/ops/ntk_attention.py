"""NTK-Attention: a prefix of m keys and values replaced by one matrix and one vector.

Liang et al. 2024 (arXiv 2406.14036, section 5 and the algorithm of its appendix). Prefix tuning
attends over m learned keys and values besides the L of the input. Their part of the softmax is
approximated by a feature map phi and a state Z[d, d_v], k[d] for each head, which are learned
instead:

    O = D^-1 (exp(Q K^T / sqrt(d)) V + phi(Q) Z),   D = exp(Q K^T / sqrt(d)) 1 + phi(Q) k

    flops       2 (d + d_v) pairs + 2 L d (d_v + 1)     instead of 2 (d + d_v) (pairs + m L)
    parameters  d (d_v + 1) a head                      instead of m (d + d_v)

With the logsumexp l of the plain attention A the two sums are put together without forming exp(l):

    O = (A + e^-l phi(Q) Z) / (1 + e^-l phi(Q) k)

Four kernels: features, their product with [Z, k], attention, the last line. Exact for its own
definition; how well the state stands for a prefix is the scheme's matter. phi is that of linear
attention, elu(x) + 1 = max(x, 0) + exp(min(x, 0)); a factor in front of it is part of Z and k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.attention import probabilities
from workloads.ops.flash_attention import FP32_BYTES, FlashAttention2
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.row_map import RowMap
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.streamed import Lanes
from workloads.work import Work

FEATURE_FLOPS, FEATURE_SPECIAL = 3, 1
"""Of elu(x) + 1 an element: maximum, minimum, exp, add."""


@dataclass(frozen=True, kw_only=True)
class FeatureMap(ProvedOp):
    """y = max(x, 0) + exp(min(x, 0)) over [rows, dim] (Katharopoulos et al. 2020, eq. 7).

    >>> FeatureMap(rows=10, dim=64).work(2**16).bytes == 2 * 2 * 640
    True
    """

    name: ClassVar[str] = "feature_map"
    rows: Num
    dim: Num
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """A pointwise kernel over rows."""
        kernel = RowMap(
            rows=self.rows, cols=self.dim, dtype=self.dtype,
            vector_flops_per_element=FEATURE_FLOPS, special_ops_per_element=FEATURE_SPECIAL,
        )  # fmt: skip
        return (Stage("features", kernel),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Rows held at a time."""
        row = self.dim * self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, row, "one row")
        return {"rows": minimum(self.rows, floor(fast_bytes / row))}

    def work(self, fast_bytes: Num) -> Work:
        """In once, out once."""
        self.tiling(fast_bytes)
        elements = self.rows * self.dim
        return Work(
            vector_flops=FEATURE_FLOPS * elements,
            special_ops=FEATURE_SPECIAL * elements,
            read_bytes=elements * self.dtype.bytes_per_element,
            write_bytes=elements * self.dtype.bytes_per_element,
        )

    def compulsory_bytes(self) -> Num:
        """In once, out once."""
        return 2 * self.rows * self.dim * self.dtype.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x[rows, dim]."""
        return {"x": rng.standard_normal((int(self.rows), int(self.dim)))}

    def reference(self, inputs: Arrays) -> Arrays:
        """The map by cases."""
        x = inputs["x"]
        return {"y": np.where(x > 0, x + 1, np.exp(x))}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel over blocks of rows."""
        x = machine.place(inputs["x"], self.dtype)
        y = machine.empty(x.values.shape, self.dtype)
        step = int(self.tiling(machine.fast_bytes)["rows"])
        with machine.kernel():
            for rows in slices(int(self.rows), step):
                with machine.scope():
                    tile = machine.load(x, rows)
                    machine.count(vector=FEATURE_FLOPS * tile.values.size,
                                  special=FEATURE_SPECIAL * tile.values.size)  # fmt: skip
                    tile.values = np.maximum(tile.values, 0) + np.exp(np.minimum(tile.values, 0))
                    machine.store(tile, y, rows)
        return {"y": y.values}


@dataclass(frozen=True, kw_only=True)
class AddState(ProvedOp):
    """O = (A + w y) / (1 + w s) with w = exp(-l), from A[rows, dim], l[rows] and [y, s] in fp32.

    >>> op = AddState(rows=8, dim=64)
    >>> op.work(2**16).bytes == 8 * (2 * 2 * 64 + 4 + 4 * 65)
    True
    """

    name: ClassVar[str] = "add_state"
    rows: Num
    dim: Num
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """A kernel that gives rows to thread blocks: inputs as wide as all it reads."""
        read_bytes = self.dim * self.dtype.bytes_per_element + FP32_BYTES * (self.dim + 2)
        inputs = ceil_div(read_bytes, self.dim * self.dtype.bytes_per_element)
        flops = self._row_flops() / self.dim
        kernel = RowMap(
            rows=self.rows, cols=self.dim, num_inputs=inputs, dtype=self.dtype,
            vector_flops_per_element=flops, special_ops_per_element=2 / self.dim,
        )  # fmt: skip
        return (Stage("add_state", kernel),)

    def _row_flops(self) -> Num:
        """w y, w s; A + w y, 1 + w s; the product with the inverse."""
        return 3 * self.dim + 2

    def _row_bytes(self) -> Num:
        return self.dim * self.dtype.bytes_per_element + FP32_BYTES * (self.dim + 2)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Rows held at a time."""
        require_fit(self.name, fast_bytes, self._row_bytes(), "one row and its state")
        return {"rows": minimum(self.rows, floor(fast_bytes / self._row_bytes()))}

    def work(self, fast_bytes: Num) -> Work:
        """3 dim + 2 flops, an exp and a reciprocal a row; everything once."""
        self.tiling(fast_bytes)
        return Work(
            vector_flops=self.rows * self._row_flops(),
            special_ops=2 * self.rows,
            read_bytes=self.rows * self._row_bytes(),
            write_bytes=self.rows * self.dim * self.dtype.bytes_per_element,
        )

    def compulsory_bytes(self) -> Num:
        """Everything once."""
        written = self.rows * self.dim * self.dtype.bytes_per_element
        return self.rows * self._row_bytes() + written

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """a[rows, dim], lse[rows, 1], state[rows, dim + 1], its last column positive."""
        rows, dim = int(self.rows), int(self.dim)
        state = rng.standard_normal((rows, dim + 1))
        state[:, -1] = np.abs(state[:, -1])
        return {
            "a": rng.standard_normal((rows, dim)),
            "lse": rng.standard_normal((rows, 1)),
            "state": state,
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """With both sums written out."""
        total, y = np.exp(inputs["lse"]), inputs["state"]
        return {"o": (total * inputs["a"] + y[:, :-1]) / (total + y[:, -1:])}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel over blocks of rows; results stay where their inputs were."""
        a = machine.place(inputs["a"], self.dtype)
        lse, state = (machine.place(inputs[n], FP32) for n in ("lse", "state"))
        o = machine.empty(a.values.shape, self.dtype)
        step = int(self.tiling(machine.fast_bytes)["rows"])
        with machine.kernel():
            for rows in slices(int(self.rows), step):
                with machine.scope():
                    held, weight = machine.load(a, rows), machine.load(lse, rows)
                    added = machine.load(state, rows)
                    machine.special(np.exp(-weight.values), into=weight)
                    machine.vector(added.values * weight.values, into=added)
                    sums = Lanes(machine, added.values[:, -1:]) + 1
                    inverse = sums.reciprocal()
                    top = Lanes(machine, held.values) + Lanes(machine, added.values[:, :-1])
                    machine.store((top * inverse).into(held), o, rows)
        return {"o": o.values}


@dataclass(frozen=True, kw_only=True)
class NtkAttention(ProvedStagedOp):
    """Attention of the input's own keys plus the state of a prefix, one for each query head.

    Shapes are those of `FlashAttention2`; Z[num_heads, head_dim, head_dim], k[num_heads, head_dim].
    `len_q` = 1 is decoding over a cache of `len_kv` keys.

    >>> op = NtkAttention(num_heads=1, len_q=1024, head_dim=64)
    >>> op.state_parameters(), op.prefix_parameters(1000)
    (4160, 128000)
    """

    name: ClassVar[str] = "ntk_attention"
    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_q: Num
    len_kv: Num | None = None
    head_dim: Num
    causal: bool = False
    dtype: DType = BF16

    def check(self) -> None:
        """As plain attention; its heads must divide, a causal query must see a key."""
        try:
            self.attention()
        except InputError as why:
            text = str(why).removeprefix(f"{FlashAttention2.name}: ")
            raise InputError(f"{self.name}: {text}") from None

    def attention(self, more_keys: Num = 0) -> FlashAttention2:
        """The plain attention; with the keys of a prefix besides, what the state replaces."""
        keys = self.len_q if self.len_kv is None else self.len_kv
        return FlashAttention2(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_q=self.len_q, len_kv=keys + more_keys, head_dim=self.head_dim,
            causal=self.causal, dtype=self.dtype,
        )  # fmt: skip

    def state_parameters(self) -> Num:
        """Z and k of all heads: H (d^2 + d)."""
        return self.num_heads * (self.head_dim * self.head_dim + self.head_dim)

    def prefix_parameters(self, len_prefix: Num) -> Num:
        """Keys and values of a prefix of that length in all heads: 2 m H d."""
        return 2 * len_prefix * self.num_heads * self.head_dim

    @property
    def _rows(self) -> Num:
        return self.batch * self.num_heads * self.len_q

    def features(self) -> FeatureMap:
        """phi(Q)."""
        return FeatureMap(rows=self._rows, dim=self.head_dim, dtype=self.dtype)

    def product(self) -> BatchedMatmul:
        """phi(Q) [Z, k] head by head, all sequences together, in fp32."""
        return BatchedMatmul(
            batch=self.num_heads, m=self.batch * self.len_q, n=self.head_dim + 1, k=self.head_dim,
            dtype=self.dtype, out_dtype=FP32,
        )  # fmt: skip

    def addition(self) -> AddState:
        """The last line of the module's equations."""
        return AddState(rows=self._rows, dim=self.head_dim, dtype=self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """The four kernels."""
        return (
            Stage("features", self.features()),
            Stage("state", self.product()),
            Stage("attend", self.attention()),
            Stage("add", self.addition()),
        )

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O once, the state once."""
        state = self.state_parameters() * self.dtype.bytes_per_element
        logsumexp = self._rows * FP32_BYTES
        return self.attention().compulsory_bytes() - logsumexp + state

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v as attention takes them, z[heads, dim, dim] and a positive s[heads, dim]."""
        heads, dim = int(self.num_heads), int(self.head_dim)
        return {
            **self.attention().inputs(rng),
            "z": rng.standard_normal((heads, dim, dim)),
            "s": rng.random((heads, dim)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The definition with both sums formed."""
        op = self.attention()
        p, lse = probabilities(op, inputs)
        plain, total = p @ np.repeat(inputs["v"], op.sizes().group, axis=1), np.exp(lse)
        q = inputs["q"]
        phi = np.where(q > 0, q + 1, np.exp(q))
        return {
            "o": (total * plain + phi @ inputs["z"])
            / (total + phi @ inputs["s"][:, :, None])
        }  # fmt: skip

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The four programs, each handing its arrays to the next."""
        q, dim = inputs["q"], int(self.head_dim)
        phi = self.features().program(machine, {"x": q.reshape(-1, dim)})["y"].reshape(q.shape)
        state = np.concatenate([inputs["z"], inputs["s"][:, :, None]], axis=2)
        found = self.product().program(machine, {"a": _by_head(phi), "b": state})["c"]
        split = found.reshape(q.shape[1], q.shape[0], q.shape[2], dim + 1).swapaxes(0, 1)
        plain = self.attention().program(machine, {n: inputs[n] for n in ("q", "k", "v")})
        parts = {"a": plain["o"], "lse": plain["lse"], "state": split}
        added = self.addition().program(
            machine, {name: x.reshape(-1, x.shape[-1]) for name, x in parts.items()}
        )
        return {"o": added["o"].reshape(q.shape)}


def _by_head(values: Values) -> Values:
    """[batch, heads, len, w] as [heads, batch len, w]: addressing, not work."""
    turned: Values = values.swapaxes(0, 1)
    return turned.reshape(turned.shape[0], -1, turned.shape[-1])

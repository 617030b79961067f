"""LongVQ: attention to the codes that keys were rounded to, in time linear in the sequence.

Liu et al. 2024 (arXiv 2404.11163). A shared representation x passes an exponential moving average
(the state-space part, which sees what is near); its keys are replaced by the nearest of S codes of
their head, and a query weighs codes instead of keys:

    h_t = a h_{t-1} + x_t,   z_j = argmin_s |h_j - c_s|^2 = argmax_s (h_j . c_s - |c_s|^2 / 2)
    o_i = sum_{j <= i} e^(h_i . c_{z_j} / sqrt(d)) v_j / sum_{j <= i} e^(h_i . c_{z_j} / sqrt(d))

With counts and sums of values kept for each code that is linear attention whose features are
softmax over codes for a query and a one-hot row for a key (as Transformer-VQ, arXiv 2309.16354,
takes its sums: by products with the one-hot rows). The softmax's own sum cancels. A head of N
tokens of width d takes

    search     2 N S (d + 1)       the norms are one more column
    weigh      2 N S d
    attend     4 N S d + 2 N S     and the chunks' own (linear recurrence with S channels)

matrix flops: O(N S d). Ignored: the affine maps that make q and k of h, local position biases,
gates and projections of the block around it, the straight-through gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, Values, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.associative_scan import SEQUENTIAL, AssociativeScan
from workloads.ops.elementwise import Elementwise
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.recurrent_attention import RecurrentAttention, recurred
from workloads.ops.recurrent_step import FP32_BYTES
from workloads.ops.softmax import Softmax
from workloads.ops.staged import Step
from workloads.ops.top_k import INDEX, TopK
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class OneHot(ProvedOp):
    """index[rows, 1] to rows[rows, cols] that are 1 there and 0 elsewhere.

    >>> OneHot(rows=10, cols=512).work(2**16).bytes == 10 * (4 + 2 * 512)
    True
    """

    name: ClassVar[str] = "one_hot"
    rows: Num
    cols: Num
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """A fill of as many bytes."""
        e = self.dtype.bytes_per_element
        elements = self.rows * (self.cols + ceil_div(INDEX.bytes_per_element, e))
        return (Stage("fill", Elementwise(num_elements=elements, num_inputs=0, dtype=self.dtype)),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Rows, and columns of them, held beside their indices."""
        e, index = self.dtype.bytes_per_element, INDEX.bytes_per_element
        require_fit(self.name, fast_bytes, e + index, "one element and its index")
        cols = minimum(self.cols, floor((fast_bytes - index) / e))
        return {"rows": minimum(self.rows, floor(fast_bytes / (index + cols * e))), "cols": cols}

    def work(self, fast_bytes: Num) -> Work:
        """A comparison an element; indices in, rows out."""
        self.tiling(fast_bytes)
        elements = self.rows * self.cols
        return Work(
            vector_flops=elements,
            read_bytes=self.rows * INDEX.bytes_per_element,
            write_bytes=elements * self.dtype.bytes_per_element,
        )

    def compulsory_bytes(self) -> Num:
        """Indices in, rows out."""
        return self.work(float(2**52)).bytes

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random indices."""
        return {"index": rng.integers(0, int(self.cols), (int(self.rows), 1)).astype(np.float64)}

    def reference(self, inputs: Arrays) -> Arrays:
        """Rows of the unit matrix."""
        return {"y": np.eye(int(self.cols))[inputs["index"][:, 0].astype(np.int64)]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel over blocks of rows."""
        index = machine.place(inputs["index"], INDEX)
        y = machine.empty((int(self.rows), int(self.cols)), self.dtype)
        tiles = self.tiling(machine.fast_bytes)
        with machine.kernel():
            for rows in slices(int(self.rows), int(tiles["rows"])):
                with machine.scope():
                    at = machine.load(index, rows)
                    for cols in slices(int(self.cols), int(tiles["cols"])):
                        with machine.scope():
                            hot = 1.0 * (at.values == np.arange(cols.start, cols.stop))
                            machine.store(machine.vector(hot, dtype=self.dtype), y, (rows, cols))
        return {"y": y.values}


@dataclass(frozen=True, kw_only=True)
class LongVq(RecurrentAttention):
    """x, V, O[batch, num_heads, len_seq, head_dim], causal; codes[num_heads, num_codes, head_dim].

    `update` makes one step (len_seq = 1) from the state that decoding keeps: counts and sums of
    values of every code, and the moving average.

    >>> op = LongVq(num_heads=1, len_seq=4096, head_dim=64, num_codes=512)
    >>> op.min_flops()[BF16] == 4096 * 512 * (8 * 64 + 2)
    True
    """

    name: ClassVar[str] = "longvq"
    num_codes: Num

    # ---- kernels ---------------------------------------------------------------------------

    def kernels(self) -> dict[str, ProvedOp]:
        """All stages by name, in the order they run; a held average is the scan's first element."""
        heads, d, codes, dtype = self.num_heads, self.head_dim, self.num_codes, self.dtype
        rows = self.batch * self.len_seq
        return {
            "local": AssociativeScan(
                batch=self.batch * heads * d, len_seq=self.len_seq + self.update,
                algorithm=SEQUENTIAL, dtype=dtype,
            ),
            "search": BatchedMatmul(
                batch=heads, m=rows, n=codes, k=d + 1, dtype=dtype, out_dtype=FP32
            ),
            "nearest": TopK(rows=self.rows, cols=codes, k=1, dtype=FP32),
            "assign": OneHot(rows=self.rows, cols=codes, dtype=dtype),
            "weigh": BatchedMatmul(batch=heads, m=rows, n=codes, k=d, dtype=dtype),
            "softmax": Softmax(rows=self.rows, cols=codes, dtype=dtype),
            "attend": self.recurrence_of(codes, d),
        }  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Every kernel once."""
        return tuple(Stage(name, op) for name, op in self.kernels().items())

    def state_bytes(self) -> Num:
        """What decoding keeps of all heads, in fp32: S (d + 1) + d each."""
        average = self.batch * self.num_heads * self.head_dim * FP32_BYTES
        return self.step_of(self.num_codes, self.head_dim).state_bytes() + average

    def compulsory_bytes(self) -> Num:
        """x, V and O once, codes and decays once, the sums of an update."""
        elements = (3 * self.rows + self.num_heads * (self.num_codes + 1)) * self.head_dim
        state = 2 * self.update * self.step_of(self.num_codes, self.head_dim).state_bytes()
        return elements * self.dtype.bytes_per_element + state

    # ---- truth and program -----------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, v, codes, decays of the channels; the state of an update."""
        heads, d = int(self.num_heads), int(self.head_dim)
        shape = int(self.batch), heads, int(self.len_seq), d
        found = {
            "x": rng.standard_normal(shape),
            "v": rng.standard_normal(shape),
            "codes": rng.standard_normal((heads, int(self.num_codes), d)),
            "decay": rng.uniform(0.01, 0.99, (heads, d)),
        }
        if self.update:
            given = self.step_of(self.num_codes, self.head_dim).inputs(rng)
            found |= {name: given[name] for name in ("state", "total")}
            found["average"] = rng.standard_normal((*shape[:2], d))
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """Every query against the code of every key before it."""
        x, v, codes = (inputs[name] for name in ("x", "v", "codes"))
        h = np.empty_like(x)
        last = inputs["average"] if self.update else np.zeros_like(x[:, :, 0])
        for t in range(x.shape[2]):
            last = h[:, :, t] = inputs["decay"] * last + x[:, :, t]
        apart = ((h[:, :, :, None] - codes[:, None]) ** 2).sum(-1)
        one_hot = np.eye(codes.shape[1])[apart.argmin(-1)]
        weight = np.exp(h @ codes.swapaxes(1, 2) / x.shape[3] ** 0.5)
        seen = np.tril(weight @ one_hot.swapaxes(2, 3))
        o, total = seen @ v, seen.sum(-1, keepdims=True)
        if not self.update:
            return {"o": o / total}
        before = weight @ inputs["total"][..., None]
        return {
            "o": (o + weight @ inputs["state"]) / (total + before),
            "state": inputs["state"] + one_hot.swapaxes(2, 3) @ v,
            "total": inputs["total"] + one_hot[:, :, 0],
            "average": last,
        }

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Average, round keys to codes, weigh codes, attend to their sums."""
        ops, codes = self.kernels(), inputs["codes"]
        h = self._averaged(step, ops["local"], inputs)
        by_head = h.swapaxes(0, 1).reshape(h.shape[1], -1, h.shape[3])
        ones = np.ones((*by_head.shape[:2], 1))
        norms = (codes * codes).sum(-1, keepdims=True) / 2
        columns = np.concatenate([codes, -norms], axis=-1).swapaxes(1, 2)
        scores = step(ops["search"], {"a": np.concatenate([by_head, ones], axis=-1), "b": columns})[
            "c"
        ].reshape(-1, codes.shape[1])
        keys = step(ops["assign"], step(ops["nearest"], {"x": scores}))["y"]
        scaled = codes.swapaxes(1, 2) / h.shape[3] ** 0.5
        weights = step(ops["weigh"], {"a": by_head, "b": scaled})["c"]
        queries = step(ops["softmax"], {"x": weights.reshape(scores.shape)})["y"]
        tokens = {n: _by_sequence(a, h) for n, a in (("q", queries), ("k", keys))}
        found = dict(recurred(step, ops["attend"], tokens | {"v": inputs["v"]}, inputs))
        return found | ({"average": h[:, :, -1]} if self.update else {})

    def _averaged(self, step: Step, scan: ProvedOp, inputs: Arrays) -> Values:
        """h of every channel; the scan is over [batch heads dim, len_seq, 1]."""
        x = inputs["x"].swapaxes(2, 3)
        if self.update:
            x = np.concatenate([inputs["average"][..., None], x], axis=3)
        decay = np.broadcast_to(inputs["decay"][..., None], x.shape)
        shape = (-1, x.shape[3], 1)
        h = step(scan, {"v0": decay.reshape(shape), "v1": x.reshape(shape)})["v1"]
        found = h.reshape(x.shape).swapaxes(2, 3)
        return found[:, :, 1:] if self.update else found


def _by_sequence(rows: Values, like: Values) -> Values:
    """Rows in the order [heads, batch, len_seq] as [batch, heads, len_seq, width]."""
    batch, heads, length = like.shape[:3]
    return rows.reshape(heads, batch, length, -1).swapaxes(0, 1)

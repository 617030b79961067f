"""Titans' neural memory: an MLP whose weights are learnt while it reads, chunk by chunk.

Behrouz et al. 2025 (arXiv 2501.00663, section 3.1 eq. 9 to 15; section 3.2 for chunks). With the
weights W of the memory M, keys k_t, values v_t, queries q_t and a rate theta_t, a momentum eta_t
and a forgetting alpha_t a token,

    u_t = gradient in W of |M(k_t) - v_t|^2  at the weights before t's chunk of b tokens
    S_t = eta_t S_{t-1} - theta_t u_t,     W_t = (1 - alpha_t) W_{t-1} + S_t,     y_t = M_{W_t}(q_t)

Gradients of a chunk need nothing of one another: one forward and one backward pass by products. A
gradient of layer l is h_i^T e_i (its input times the gradient of its output), so that neither u_t
nor W_t is ever made: the scan over tokens runs on coefficients alone, P_ti of u_i (and of S_0) in
S_t, K_ti in W_t,

    P_t = eta_t P_{t-1}, P_tt = -theta_t,     K_t = (1 - alpha_t) K_{t-1} + P_t

With beta_t the product of 1 - alpha up to t, and Z the queries on their way through the memory, a
chunk of c tokens is read and learnt as

    Z W_t     = beta_t Z W_0 + K_t0 Z S_0 + (K * Z H^T) E
    W_c, S_c  = beta_c W_0 + K_c0 S_0 + H^T (K_c E),    P_c0 S_0 + H^T (P_c E)

layer by layer, SiLU between them. Over chunks it is sequential, inside it is products: per token
and layer of d_in x d_out weights 12 d_in d_out flops (10 in the first) and 2 c (d_in + d_out).
Weights and momentum have the format of the activations. Ignored: the projections that make q, k, v
and the gates, normalisation, biases and the residual connection of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.machine import Index, Machine, SlowArray, Values, slices
from workloads.numeric import Num, ceil_div, floor, maximum, minimum, where
from workloads.op import Arrays, ProvedOp, Stage, checked_size, require_fit
from workloads.ops.elementwise import Elementwise, Formula, mul
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.streamed import Lanes, StreamedOp, stream
from workloads.work import Work

FP32_BYTES: Final = FP32.bits // 8

# ---- pointwise maps ------------------------------------------------------------------------


def _silu_slope(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    s = (1 + (-x[0]).exp()).reciprocal()
    y = x[0] * s
    return y, s + y * (1 - s)


def _naive_silu_slope(x: Sequence[Values]) -> tuple[Values, ...]:
    s = 1 / (1 + np.exp(-x[0]))
    return x[0] * s, s * (1 + x[0] * (1 - s))


MAPS: Final[Mapping[str, Formula]] = {
    "silu": Formula(
        num_inputs=1, vector_flops=2, special_ops=2,
        run=lambda x: (x[0] * (1 + (-x[0]).exp()).reciprocal(),),
        naive=lambda x: (x[0] / (1 + np.exp(-x[0])),),
    ),
    "silu_slope": Formula(
        num_inputs=1, num_outputs=2, vector_flops=5, special_ops=2,
        run=_silu_slope, naive=_naive_silu_slope,
    ),
    "error": Formula(
        num_inputs=2, vector_flops=2, special_ops=0,
        run=lambda x: ((x[0] - x[1]) * 2.0,), naive=lambda x: (2 * (x[0] - x[1]),),
    ),
}  # fmt: skip
"""SiLU; SiLU and its slope; the gradient of a squared error."""


@dataclass(frozen=True, kw_only=True)
class MemoryMap(StreamedOp):
    """One of `MAPS`, element by element.

    >>> MemoryMap(num_elements=100, formula="error").work(2**10).vector_flops
    200
    """

    name: ClassVar[str] = "memory_map"
    num_elements: Num
    formula: str = "silu"
    dtype: DType = BF16

    def check(self) -> None:
        """A known map."""
        if self.formula not in MAPS:
            raise UnknownNameError("formula", self.formula, list(MAPS))

    def elements(self) -> Num:
        """Length of every array."""
        return self.num_elements

    def read_bytes(self) -> Num:
        """Inputs per element."""
        return MAPS[self.formula].num_inputs * self.dtype.bytes_per_element

    def write_bytes(self) -> Num:
        """Outputs per element."""
        return MAPS[self.formula].num_outputs * self.dtype.bytes_per_element

    def steps(self) -> tuple[Num, Num]:
        """As the map states."""
        return MAPS[self.formula].vector_flops, MAPS[self.formula].special_ops

    def stages(self) -> tuple[Stage, ...]:
        """Timed as any pointwise map with these counts."""
        stated = MAPS[self.formula]
        one = Elementwise(
            num_elements=self.num_elements, num_inputs=stated.num_inputs,
            num_outputs=stated.num_outputs, vector_flops_per_element=stated.vector_flops,
            special_ops_per_element=stated.special_ops, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("map", one),)

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x0, x1, ... of [num_elements]."""
        size = int(self.num_elements)
        return {f"x{i}": rng.standard_normal(size) for i in range(MAPS[self.formula].num_inputs)}

    def reference(self, inputs: Arrays) -> Arrays:
        """The map's truth."""
        found = MAPS[self.formula].naive(list(inputs.values()))
        return {f"y{i}": values for i, values in enumerate(found)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Chunk after chunk in one kernel."""
        stated, shape = MAPS[self.formula], (int(self.num_elements),)
        sources = [machine.place(values, self.dtype) for values in inputs.values()]
        targets = [machine.empty(shape, self.dtype) for _ in range(stated.num_outputs)]
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        stream(machine, sources, targets, chunk, stated.run)
        return {f"y{i}": target.values for i, target in enumerate(targets)}


# ---- sums of rows with a coefficient each --------------------------------------------------

BLENDS: Final[Mapping[str, tuple[tuple[int, ...], ...]]] = {
    "read": ((0, 1, 2),),
    "weigh": ((0,), (0,)),
    "learn": ((0, 1, 2), (1, 3)),
}
"""By name, the inputs that each output sums: what a chunk reads; the gradients as weights and
momentum take them; the weights and the momentum after the chunk."""


@dataclass(frozen=True, kw_only=True)
class RowBlend(ProvedOp):
    """Outputs that are sums of [rows, cols] inputs, each term with a coefficient of its row.

    `form` is one of `BLENDS`; coefficients s[rows, terms] are fp32, in the order of the terms.

    >>> RowBlend(rows=2, cols=8, form="learn").work(2**10).vector_flops == 2 * 8 * (5 + 3)
    True
    """

    name: ClassVar[str] = "row_blend"
    rows: Num
    cols: Num
    form: str = "read"
    dtype: DType = BF16

    def check(self) -> None:
        """A known form."""
        if self.form not in BLENDS:
            raise UnknownNameError("form", self.form, list(BLENDS))

    @property
    def num_inputs(self) -> int:
        """Arrays read."""
        return 1 + max(max(terms) for terms in BLENDS[self.form])

    @property
    def num_outputs(self) -> int:
        """Arrays written."""
        return len(BLENDS[self.form])

    @property
    def terms(self) -> int:
        """Coefficients of a row."""
        return sum(len(terms) for terms in BLENDS[self.form])

    @property
    def flops(self) -> int:
        """Per element: a product a term, a sum between two."""
        return 2 * self.terms - self.num_outputs

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a pointwise map of those arrays, the coefficients as more columns."""
        arrays = self.num_inputs + self.num_outputs
        more = ceil_div(self.terms * FP32_BYTES, int(arrays * self.dtype.bytes_per_element) or 1)
        one = Elementwise(
            num_elements=self.rows * (self.cols + more), num_inputs=self.num_inputs,
            num_outputs=self.num_outputs, vector_flops_per_element=self.flops, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("blend", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Columns of a row at a time, inputs and outputs held together."""
        column = (self.num_inputs + self.num_outputs) * self.dtype.bytes_per_element
        beside = self.terms * FP32_BYTES
        require_fit(self.name, fast_bytes, beside + column, "one element of every array")
        return {"tc": minimum(self.cols, floor((fast_bytes - beside) / column))}

    def work(self, fast_bytes: Num) -> Work:
        """Every array once."""
        self.tiling(fast_bytes)
        size, e = self.rows * self.cols, self.dtype.bytes_per_element
        return Work(
            vector_flops=size * self.flops,
            read_bytes=size * self.num_inputs * e + self.rows * self.terms * FP32_BYTES,
            write_bytes=size * self.num_outputs * e,
        )

    def compulsory_bytes(self) -> Num:
        """Every array once."""
        arrays = (self.num_inputs + self.num_outputs) * self.dtype.bytes_per_element
        return self.rows * (self.cols * arrays + self.terms * FP32_BYTES)

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x0, x1, ... [rows, cols] and s[rows, terms]."""
        rows = int(self.rows)
        found = {
            f"x{i}": rng.standard_normal((rows, int(self.cols))) for i in range(self.num_inputs)
        }
        return found | {"s": rng.standard_normal((rows, self.terms))}

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy's sums of whole arrays."""
        return self._sums([inputs[f"x{i}"] for i in range(self.num_inputs)], inputs["s"])

    def _sums(self, x: Sequence[Values], s: Values) -> dict[str, Values]:
        found, at = {}, 0
        for i, terms in enumerate(BLENDS[self.form]):
            parts = [s[:, at + j, None] * x[term] for j, term in enumerate(terms)]
            found[f"y{i}"] = np.sum(parts, axis=0)
            at += len(terms)
        return found

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Row by row in one kernel."""
        x = [machine.place(inputs[f"x{i}"], self.dtype) for i in range(self.num_inputs)]
        s = machine.place(inputs["s"], FP32)
        y = [machine.empty(inputs["x0"].shape, self.dtype) for _ in range(self.num_outputs)]
        parts = slices(int(self.cols), int(self.tiling(machine.fast_bytes)["tc"]))
        with machine.kernel():
            for row in range(int(self.rows)):
                with machine.scope():
                    held = machine.load(s, [row])
                    for cols in parts:
                        with machine.scope():
                            given = [machine.load(a, ([row], cols)).values for a in x]
                            sums = list(self._sums(given, held.values).values())
                            self._store(machine, sums, y, (row, cols))
        return {f"y{i}": target.values for i, target in enumerate(y)}

    def _store(
        self, mc: Machine, sums: list[Values], y: list[SlowArray], at: tuple[int, slice]
    ) -> None:
        for values, target, terms in zip(sums, y, BLENDS[self.form], strict=True):
            tile = mc.vector(values, per_element=2 * len(terms) - 1, dtype=self.dtype)
            mc.store(tile, target, at)


# ---- the scan over tokens ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MomentumScan(ProvedOp):
    """Coefficients P and K of `batch` chunks of `chunk` tokens from their three gates (fp32).

    Out: k[batch, c, c] in `dtype`; read[batch, c, 3], weigh[batch, c, 2] and learn[batch, 5] as
    `RowBlend` takes them, fp32. A token is 3 flops a column of c + 1, and 2 (1 - alpha, beta).

    >>> MomentumScan(batch=3, chunk=8).work(2**12).vector_flops == 3 * 8 * (3 * 9 + 2)
    True
    """

    name: ClassVar[str] = "momentum_scan"
    batch: Num = 1
    chunk: Num
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """Timed as one pass over what is written; the chain of tokens is not."""
        c, e = self.chunk, self.dtype.bytes_per_element
        numbers = c * c + ceil_div((8 * c + 5) * FP32_BYTES, int(e) or 1)
        one = Elementwise(
            num_elements=self.batch * numbers, num_inputs=0, vector_flops_per_element=4,
            dtype=self.dtype,
        )  # fmt: skip
        return (Stage("scan", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice: two rows of coefficients, and the gates of a chunk."""
        needed = FP32_BYTES * (6 * self.chunk + 10)
        require_fit(self.name, fast_bytes, needed, "a row of coefficients; shorten the chunk")
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """As in the class docstring."""
        self.tiling(fast_bytes)
        c, e = self.chunk, self.dtype.bytes_per_element
        return Work(
            vector_flops=self.batch * c * (3 * (c + 1) + 2),
            read_bytes=self.batch * 3 * c * FP32_BYTES,
            write_bytes=self.batch * (c * c * e + (5 * c + 5) * FP32_BYTES),
        )

    def compulsory_bytes(self) -> Num:
        """Gates in, coefficients out."""
        c = self.chunk
        written = c * c * self.dtype.bytes_per_element
        return self.batch * (written + (8 * c + 5) * FP32_BYTES)

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """eta, alpha in [0, 1] with both ends among them, theta > 0; [batch, chunk] each."""
        shape = (int(self.batch), int(self.chunk))
        return random_gates(rng, shape)

    def reference(self, inputs: Arrays) -> Arrays:
        """Products of the gates between every two tokens."""
        eta, keep, theta = inputs["eta"], 1 - inputs["alpha"], inputs["theta"]
        batch, c = eta.shape
        p, kept = np.zeros((batch, c, c + 1)), np.zeros((batch, c, c))
        for t in range(c):
            p[:, t, 0] = eta[:, : t + 1].prod(axis=1)
            for i in range(t + 1):
                p[:, t, i + 1] = -theta[:, i] * eta[:, i + 1 : t + 1].prod(axis=1)
                kept[:, t, i] = keep[:, i + 1 : t + 1].prod(axis=1)
        k, beta, one = kept @ p, np.cumprod(keep, axis=1), np.ones((batch, c))
        last = [beta[:, -1], k[:, -1, 0], one[:, 0], p[:, -1, 0], one[:, 0]]
        return {
            "k": k[:, :, 1:],
            "read": np.stack([beta, k[:, :, 0], one], axis=2),
            "weigh": np.stack([k[:, -1, 1:], p[:, -1, 1:]], axis=2),
            "learn": np.stack(last, axis=1),
        }

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: chunk by chunk, token by token; no gate is ever divided by."""
        batch, c = int(self.batch), int(self.chunk)
        slow = {name: machine.place(values, FP32) for name, values in inputs.items()}
        out = {
            "k": machine.empty((batch, c, c), self.dtype),
            "read": machine.empty((batch, c, 3), FP32),
            "weigh": machine.empty((batch, c, 2), FP32),
            "learn": machine.empty((batch, 5), FP32),
        }
        with machine.kernel():
            for at in range(batch):
                with machine.scope():
                    self._chunk(machine, slow, out, at)
        return {name: array.values for name, array in out.items()}

    def _chunk(
        self, mc: Machine, slow: dict[str, SlowArray], out: dict[str, SlowArray], at: int
    ) -> None:
        c = int(self.chunk)
        eta, alpha, theta = (mc.load(slow[n], at).values for n in ("eta", "alpha", "theta"))
        p, k = mc.full((c + 1,), 0.0), mc.full((c + 1,), 0.0)
        three = mc.full((3,), 1.0)  # beta, the share of S_0 in the weights, 1
        p.values[0] = 1.0
        for t in range(c):
            mc.vector(eta[t] * p.values, into=p)
            p.values[t + 1] = -theta[t]  # a sign is an operand modifier
            keep = 1 - alpha[t]
            mc.vector(keep * k.values + p.values, per_element=2, into=k)
            three.values[:2] = keep * three.values[0], k.values[0]
            mc.count(vector=2)
            _store(mc, k.values[1:], out["k"], (at, t))
            mc.store(three, out["read"], (at, t))
        for i, row in enumerate((k, p)):
            _store(mc, row.values[1:], out["weigh"], (at, slice(None), i))
        last = [three.values[0], k.values[0], 1.0, p.values[0], 1.0]
        _store(mc, np.array(last), out["learn"], at)


def _store(mc: Machine, values: Values, target: SlowArray, at: Index) -> None:
    """Part of a held row to slow memory."""
    with mc.scope():
        mc.store(mc.hold(values), target, at)


def random_gates(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Values]:
    """eta, alpha in [0, 1], a fifth of them at either end, and rates from hardly any to a tenth."""
    found = {}
    for name in ("eta", "alpha"):
        inside, end = rng.random(shape), rng.integers(0, 2, shape)
        found[name] = np.where(rng.random(shape) < 0.4, end, inside)
    return found | {"theta": 10 ** rng.uniform(-4, -1, shape)}


# ---- the memory ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NeuralMemory(SteppedOp):
    """q, k, v[batch num_heads, len_seq, dim] through one memory a head, learnt in chunks.

    `depth` layers of weights, `width` between them (left out: `dim`). A last, shorter chunk runs
    at its own length. One new token is len_seq = 1 from the held weights and momentum.

    >>> op = NeuralMemory(len_seq=4096, dim=512, depth=1, chunk=64)
    >>> op.work(2**22).tensor_flops[BF16] == 4096 * (10 * 512**2 + 2 * 64 * 2 * 512)
    True
    >>> op.state_bytes() == 2 * 2 * 512**2         # weights and momentum, whatever the length
    True
    """

    name: ClassVar[str] = "neural_memory"
    batch: Num = 1
    num_heads: Num = 1
    len_seq: Num
    dim: Num
    depth: int = 2
    width: Num | None = None
    chunk: int = 64
    dtype: DType = BF16

    def check(self) -> None:
        """Whole numbers of layers and of tokens a chunk."""
        for name in ("depth", "chunk"):
            checked_size(self.name, name, getattr(self, name))
            if not isinstance(getattr(self, name), int):
                raise InputError(f"{self.name}: {name} is one whole number, not an array")

    @property
    def streams(self) -> Num:
        """Memories: one a head of each sequence."""
        return self.batch * self.num_heads

    @property
    def layers(self) -> list[tuple[Num, Num]]:
        """Rows and columns of each layer's weights."""
        hidden = self.dim if self.width is None else self.width
        return list(pairwise([self.dim, *[hidden] * (self.depth - 1), self.dim]))

    def weights(self) -> Num:
        """Numbers of one memory's weights."""
        return sum((rows * cols for rows, cols in self.layers), start=0)

    def state_bytes(self) -> Num:
        """Weights and momentum of all memories: what decoding keeps."""
        return 2 * self.streams * self.weights() * self.dtype.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """q, k, v and y, the gates, weights and momentum in and out, once each."""
        tokens = self.streams * self.len_seq
        moved = 4 * tokens * self.dim * self.dtype.bytes_per_element
        return moved + 3 * tokens * FP32_BYTES + 2 * self.state_bytes()

    # ---- kernels ---------------------------------------------------------------------------

    def _product(self, rows: Num, cols: Num, inner: Num) -> BatchedMatmul:
        return BatchedMatmul(batch=self.streams, m=rows, n=cols, k=inner, dtype=self.dtype)

    def _map(self, formula: str, size: Num) -> MemoryMap:
        return MemoryMap(num_elements=self.streams * size, formula=formula, dtype=self.dtype)

    def _blend(self, form: str, rows: Num, cols: Num) -> RowBlend:
        return RowBlend(rows=self.streams * rows, cols=cols, form=form, dtype=self.dtype)

    def layer_kernels(self, at: int, c: Num) -> dict[str, ProvedOp]:
        """Of layer `at`, for a chunk of c tokens: what it runs, by name."""
        (rows, cols), last = self.layers[at], at == self.depth - 1
        found: dict[str, ProvedOp] = {"predict": self._product(c, cols, rows)}
        if last:
            found["error"] = self._map("error", c * cols)
        else:
            found["activate"] = self._map("silu_slope", c * cols)
            found["silu"] = self._map("silu", c * cols)
        if at:
            found["back"] = self._product(c, rows, cols)
            found["slope"] = mul(self.streams * c * rows, self.dtype)
        return found | {
            "query": self._product(c, 2 * cols, rows),
            "score": self._product(c, c, rows),
            "mask": mul(self.streams * c * c, self.dtype),
            "recent": self._product(c, cols, c),
            "read": self._blend("read", c, cols),
            "weigh": self._blend("weigh", c, cols),
            "gradient": self._product(rows, 2 * cols, c),
            "learn": self._blend("learn", 1, rows * cols),
        }

    def scan(self, chunks: Num, c: Num) -> MomentumScan:
        """Coefficients of that many chunks of c tokens of every memory, at once."""
        return MomentumScan(batch=self.streams * chunks, chunk=c, dtype=self.dtype)

    def parts(self) -> list[tuple[str, Num, Num]]:
        """Whole chunks and the one left: a prefix, how many, their length."""
        whole = self.len_seq // self.chunk
        rest = self.len_seq - whole * self.chunk
        some = where(rest > 0, 1, 0)
        return [("", whole, minimum(self.chunk, self.len_seq)), ("last_", some, maximum(rest, 1))]

    def stages(self) -> tuple[Stage, ...]:
        """The scans over gates, then every layer's kernels as often as there are chunks."""
        found = []
        for prefix, count, c in self.parts():
            scan = self.scan(maximum(count, 1), c)
            found.append(Stage(f"{prefix}gates", scan, where(count > 0, 1, 0)))
            for at in range(self.depth):
                kernels = self.layer_kernels(at, c).items()
                found += [Stage(f"{prefix}{name}_{at}", op, count) for name, op in kernels]
        return tuple(stage for stage in found if not _never(stage.times))

    # ---- truth and program -----------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v, the gates[streams, len_seq], weights w0, w1 ... and momentum s0, s1 ..."""
        streams, length = int(self.streams), int(self.len_seq)
        shape = (streams, length, int(self.dim))
        found = {name: rng.standard_normal(shape) / shape[2] ** 0.5 for name in ("q", "k", "v")}
        for at, (rows, cols) in enumerate(self.layers):
            size = (streams, int(rows), int(cols))
            found[f"w{at}"] = rng.standard_normal(size) / size[1] ** 0.5
            found[f"s{at}"] = 0.1 * rng.standard_normal(size)
        return found | random_gates(rng, shape[:2])

    def reference(self, inputs: Arrays) -> Arrays:
        """Token by token and memory by memory, every weight moved by its gradient."""
        names = [f"{kind}{at}" for kind in "ws" for at in range(self.depth)]
        held = {name: np.array(inputs[name]) for name in names}
        y = np.empty_like(inputs["q"])
        for stream_at in range(y.shape[0]):
            w, s = ([held[f"{kind}{at}"][stream_at] for at in range(self.depth)] for kind in "ws")
            q, k, v, eta, alpha, theta = (
                inputs[n][stream_at] for n in ("q", "k", "v", "eta", "alpha", "theta")
            )
            for t in range(y.shape[1]):
                if t % self.chunk == 0:
                    start = [layer.copy() for layer in w]
                for at, u in enumerate(_gradients(start, k[t], v[t])):
                    s[at][...] = eta[t] * s[at] - theta[t] * u
                    w[at][...] = (1 - alpha[t]) * w[at] + s[at]
                y[stream_at, t] = _through(w, q[t])[-1]
        return {"y": y} | held

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Chunk after chunk: predict, go back, read, learn."""
        pairs = {
            at: np.concatenate([inputs[f"w{at}"], inputs[f"s{at}"]], axis=2)
            for at in range(self.depth)
        }
        y, scans = np.empty_like(inputs["q"]), self._scans(step, inputs)
        for at, rows in enumerate(slices(int(self.len_seq), int(self.chunk))):
            c = rows.stop - rows.start
            kernels = [self.layer_kernels(layer, c) for layer in range(self.depth)]
            chunk = _Chunk(step, kernels, pairs, scans[at])
            given = {name: inputs[name][:, rows] for name in ("q", "k", "v")}
            inputs_of, errors = chunk.errors(given["k"], given["v"])
            y[:, rows] = chunk.read(given["q"], inputs_of, errors)
            chunk.learn(inputs_of, errors)
        found = {"y": y}
        for at, pair in pairs.items():
            found[f"w{at}"], found[f"s{at}"] = np.split(pair, 2, axis=2)
        return found

    def _scans(self, step: Step, inputs: Arrays) -> list[dict[str, Values]]:
        """Coefficients of each chunk, [streams, ...]."""
        streams, found, start = int(self.streams), list[dict[str, Values]](), 0
        for _, count, c in self.parts():
            chunks, length = int(count), int(c)
            if not chunks:
                continue
            rows = slice(start, start + chunks * length)
            gates = {
                name: inputs[name][:, rows].reshape(-1, length)
                for name in ("eta", "alpha", "theta")
            }
            made = step(self.scan(chunks, length), gates)
            shaped = {n: v.reshape(streams, chunks, *v.shape[1:]) for n, v in made.items()}
            found += [{n: v[:, at] for n, v in shaped.items()} for at in range(chunks)]
            start = rows.stop
        return found


class _Chunk:
    """One chunk of every memory: its kernels a layer, the pairs [W | S], its coefficients."""

    __slots__ = ("coefficients", "kernels", "pairs", "step")

    def __init__(
        self,
        step: Step,
        kernels: list[dict[str, ProvedOp]],
        pairs: dict[int, Values],
        coefficients: dict[str, Values],
    ) -> None:
        self.step, self.kernels, self.pairs = step, kernels, pairs
        self.coefficients = coefficients

    def errors(self, k: Values, v: Values) -> tuple[list[Values], list[Values]]:
        """Inputs h of each layer, and gradients e of each layer's output."""
        inputs, slopes, out = [k], list[Values](), k
        for at, kernels in enumerate(self.kernels):
            out = self._product(at, "predict", inputs[at], self._weights(at))
            if "activate" in kernels:
                active, slope = self._mapped(at, "activate", out)
                inputs.append(active)
                slopes.append(slope)
        errors = [self._mapped(len(self.kernels) - 1, "error", out, v)[0]]
        for at in range(len(self.kernels) - 1, 0, -1):
            back = self._product(at, "back", errors[0], self._weights(at).swapaxes(1, 2))
            errors.insert(0, self._mapped(at, "slope", back, slopes[at - 1])[0])
        return inputs, errors

    def read(self, z: Values, inputs: list[Values], errors: list[Values]) -> Values:
        """The queries through every token's weights."""
        for at in range(len(self.kernels)):
            held = self._product(at, "query", z, self.pairs[at])
            scores = self._product(at, "score", z, inputs[at].swapaxes(1, 2))
            scores = self._mapped(at, "mask", scores, self.coefficients["k"])[0]
            recent = self._product(at, "recent", scores, errors[at])
            terms = [*np.split(held, 2, axis=2), recent]
            z = self._blended(at, "read", terms)[0].reshape(recent.shape)
            if "silu" in self.kernels[at]:
                z = self._mapped(at, "silu", z)[0]
        return z

    def learn(self, inputs: list[Values], errors: list[Values]) -> None:
        """Weights and momentum at the chunk's end."""
        for at, error in enumerate(errors):
            both = [x.reshape(error.shape) for x in self._blended(at, "weigh", [error])]
            taken = np.concatenate(both, axis=2)
            gained = self._product(at, "gradient", inputs[at].swapaxes(1, 2), taken)
            terms = [part for x in (self.pairs[at], gained) for part in np.split(x, 2, axis=2)]
            shape = terms[0].shape
            flat = [x.reshape(shape[0], -1) for x in terms]
            made = self._blended(at, "learn", flat)
            self.pairs[at] = np.concatenate([x.reshape(shape) for x in made], axis=2)

    def _weights(self, at: int) -> Values:
        return np.split(self.pairs[at], 2, axis=2)[0]

    def _product(self, at: int, name: str, a: Values, b: Values) -> Values:
        return self.step(self.kernels[at][name], {"a": a, "b": b})["c"]

    def _mapped(self, at: int, name: str, *arrays: Values) -> list[Values]:
        flat = {f"x{i}": np.ascontiguousarray(x).reshape(-1) for i, x in enumerate(arrays)}
        made = self.step(self.kernels[at][name], flat)
        return [y.reshape(arrays[0].shape) for y in made.values()]

    def _blended(self, at: int, name: str, terms: list[Values]) -> list[Values]:
        rows = {f"x{i}": x.reshape(-1, x.shape[-1]) for i, x in enumerate(terms)}
        s = self.coefficients[name]
        made = self.step(self.kernels[at][name], rows | {"s": s.reshape(-1, s.shape[-1])})
        return list(made.values())


def _never(times: Num) -> bool:
    return bool(np.all(np.equal(times, 0)))


def _through(weights: list[Values], x: Values) -> list[Values]:
    """What comes out of each layer of the memory, the last without SiLU."""
    outs = []
    for layer in weights:
        outs.append(x @ layer)
        x = outs[-1] / (1 + np.exp(-outs[-1]))
    return outs


def _gradients(weights: list[Values], k: Values, v: Values) -> list[Values]:
    """Gradients of |M(k) - v|^2 in each layer's weights, of one token."""
    outs = _through(weights, k)
    error, found = 2 * (outs[-1] - v), list[Values]()
    for at in range(len(weights) - 1, -1, -1):
        before = k if at == 0 else outs[at - 1] / (1 + np.exp(-outs[at - 1]))
        found.insert(0, np.outer(before, error))
        if at:
            s = 1 / (1 + np.exp(-outs[at - 1]))
            error = (weights[at] @ error) * s * (1 + outs[at - 1] * (1 - s))
    return found

"""Hydra: a bidirectional mixer of sequences by quasi-separable matrices, two scans of Mamba-2.

Hwang et al. 2024 (arXiv 2407.09941, sections 3.1 and 3.2): y = M x, token by token of each head,

    M_ij = C_{i-1} . B_j     a_{j+1} ... a_{i-1} dt_j        below the diagonal
    M_ii = d_i                                               on it
    M_ij = C'_{i+1} . B'_j   a'_{i+1} ... a'_{j-1} dt'_j     above it

which is    QS(x) = shift(SS(x)) + flip(shift(SS'(flip(x)))) + d x

with SS the scan of Mamba-2: linear in the length, 2 scans. Both directions read the same x and have
dt, B and C of their own; a and the bias of dt are shared. They run as one scan of twice the batch
on copies turned round, as the authors' code does. The layer around it (`HydraLayer`) projects once
for both directions and convolves around each token, not before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import Elementwise
from workloads.ops.mamba2_layer import StateSpaceLayer, projected
from workloads.ops.matmul import Matmul
from workloads.ops.short_conv import ShortConv
from workloads.ops.ssd_scan import FP32_BYTES, SsdScan
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.structured import moved
from workloads.work import Work

DIRECTIONS = 2


@dataclass(frozen=True, kw_only=True)
class MergeDirections(ProvedOp):
    """y_t = f_{t-1} + r_{t+1} + d_t x_t over f, r, x[batch, len_seq, num_heads, head_dim].

    f is the scan, r the one of the turned sequence turned back; beyond the ends both are zero:

        bytes  (3 L - 2 + L) P e + L e a head,    flops  (3 L - 2) P

    >>> MergeDirections(len_seq=10, num_heads=2, head_dim=4).work(2**10).vector_flops
    224
    """

    name: ClassVar[str] = "merge_directions"
    batch: Num = 1
    len_seq: Num
    num_heads: Num
    head_dim: Num = 64
    dtype: DType = BF16

    @property
    def streams(self) -> Num:
        """Heads of all sequences."""
        return self.batch * self.num_heads

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a pointwise map of three arrays."""
        per_row = ceil_div(4 * self.head_dim + 1, 4)
        one = Elementwise(
            num_elements=self.streams * self.len_seq * per_row, num_inputs=3,
            vector_flops_per_element=3, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("merge", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """`cols` of a token's head at a time; x, y, a neighbour and d are held."""
        e = self.dtype.bytes_per_element
        column = 2 * e + FP32_BYTES
        require_fit(self.name, fast_bytes, e + column, "one number of each array")
        return {"cols": minimum(self.head_dim, floor((fast_bytes - e) / column))}

    def work(self, fast_bytes: Num) -> Work:
        """As in the class docstring."""
        self.tiling(fast_bytes)
        p, n, e = self.head_dim, self.len_seq, self.dtype.bytes_per_element
        return Work(
            tensor_flops={},
            vector_flops=self.streams * (3 * n - 2) * p,
            read_bytes=self.streams * ((3 * n - 2) * p + n) * e,
            write_bytes=self.streams * n * p * e,
        )

    def compulsory_bytes(self) -> Num:
        """Everything once."""
        p, n = self.head_dim, self.len_seq
        return self.streams * ((4 * n - 2) * p + n) * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """f, r, x and d[batch, len_seq, num_heads]."""
        shape = [int(n) for n in (self.batch, self.len_seq, self.num_heads, self.head_dim)]
        found = {name: rng.standard_normal(shape) for name in ("f", "r", "x")}
        return found | {"d": rng.standard_normal(shape[:3])}

    def reference(self, inputs: Arrays) -> Arrays:
        """Shifted arrays added up."""
        y = inputs["d"][..., None] * inputs["x"]
        y[:, 1:] += inputs["f"][:, :-1]
        y[:, :-1] += inputs["r"][:, 1:]
        return {"y": y}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: token by token and head by head."""
        slow = {name: machine.place(values, self.dtype) for name, values in inputs.items()}
        slow["y"] = machine.empty(inputs["x"].shape, self.dtype)
        parts = slices(int(self.head_dim), int(self.tiling(machine.fast_bytes)["cols"]))
        with machine.kernel():
            for at in np.ndindex(*inputs["d"].shape):
                with machine.scope():
                    d = machine.load(slow["d"], at)
                    for cols in parts:
                        with machine.scope():
                            self._token(machine, slow, (*at, cols), float(d.values))
        return {"y": slow["y"].values}

    def _token(
        self, mc: Machine, slow: dict[str, SlowArray], at: tuple[int, int, int, slice], d: float
    ) -> None:
        row, t, head, cols = at
        y = mc.vector(d * mc.load(slow["x"], at).values)
        for name, place in (("f", t - 1), ("r", t + 1)):
            if 0 <= place < int(self.len_seq):
                with mc.scope():
                    other = mc.load(slow[name], (row, place, head, cols))
                    mc.vector(y.values + other.values, into=y)
        mc.store(y, slow["y"], at)


@dataclass(frozen=True, kw_only=True)
class QuasiSeparable(SteppedOp):
    """The mixer over x[batch, len_seq, num_heads, head_dim]; its truth is the dense matrix.

    >>> op = QuasiSeparable(len_seq=1024, num_heads=24, state_dim=64)
    >>> one = op.scan().over(batch=1)
    >>> op.min_flops()[BF16] == 2 * one.min_flops()[BF16]
    True
    """

    name: ClassVar[str] = "quasi_separable"
    batch: Num = 1
    len_seq: Num
    num_heads: Num
    num_groups: Num = 1
    head_dim: Num = 64
    state_dim: Num = 64
    chunk: int = 64
    dtype: DType = BF16

    def check(self) -> None:
        """What a scan refuses."""
        self.scan()

    def scan(self) -> SsdScan:
        """Both directions side by side in the batch."""
        return SsdScan(
            batch=DIRECTIONS * self.batch, len_seq=self.len_seq, num_heads=self.num_heads,
            num_groups=self.num_groups, head_dim=self.head_dim, state_dim=self.state_dim,
            chunk=self.chunk, skip=False, keep_state=False, dtype=self.dtype,
        )  # fmt: skip

    def turn(self) -> Elementwise:
        """Copies of x, dt, B and C of one direction, turned round."""
        numbers = self.batch * self.len_seq * self.scan().token_numbers()
        return Elementwise(num_elements=numbers, vector_flops_per_element=0, dtype=self.dtype)

    def merge(self) -> MergeDirections:
        """The sum of both and of the diagonal."""
        return MergeDirections(
            batch=self.batch, len_seq=self.len_seq, num_heads=self.num_heads,
            head_dim=self.head_dim, dtype=self.dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Turn, scan, merge."""
        return (
            Stage("turn", self.turn()),
            Stage("scan", self.scan()),
            Stage("merge", self.merge()),
        )

    def compulsory_bytes(self) -> Num:
        """x and y once, d, and dt, B, C of both directions."""
        heads, p = self.num_heads, self.head_dim
        directed = DIRECTIONS * (heads + 2 * self.num_groups * self.state_dim)
        per_token = heads * (2 * p + 1) + directed
        numbers = 2 * heads * FP32_BYTES
        return self.batch * self.len_seq * per_token * self.dtype.bytes_per_element + numbers

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, d, a, bias; dt, b, c forward and (with an r) of the other direction."""
        scan, shape = self.scan(), (int(self.batch), int(self.len_seq))
        found = scan.token_inputs(rng, *shape) | scan.head_inputs(rng)
        other = scan.token_inputs(rng, *shape)
        found |= {f"r{name}": other[name] for name in ("dt", "b", "c")}
        return found | {"d": rng.standard_normal((*shape, int(self.num_heads)))}

    def reference(self, inputs: Arrays) -> Arrays:
        """The dense matrix of every head, times x."""
        lower, upper = (self._dense(inputs, prefix) for prefix in ("", "r"))
        matrix = lower + upper[:, :, ::-1, ::-1]
        places = np.arange(int(self.len_seq))
        matrix[:, :, places, places] = inputs["d"].swapaxes(1, 2)
        return {"y": np.einsum("bhij,bjhp->bihp", matrix, inputs["x"])}

    def _dense(self, inputs: Arrays, prefix: str) -> Values:
        """M below its diagonal, of one direction as it reads, [batch, heads, len_seq, len_seq]."""
        turn = slice(None, None, -1 if prefix else 1)
        share = int(self.num_heads) // int(self.num_groups)
        b, c = (np.repeat(inputs[prefix + n][:, turn], share, axis=2) for n in ("b", "c"))
        dt = np.logaddexp(0, inputs[prefix + "dt"][:, turn] + inputs["bias"])
        length = int(self.len_seq)
        found = np.zeros((int(self.batch), int(self.num_heads), length, length))
        for i in range(length):
            for j in range(i):
                gone = inputs["a"] * dt[:, j + 1 : i].sum(axis=1)
                near = np.einsum("bhn,bhn->bh", c[:, i - 1], b[:, j])
                found[:, :, i, j] = near * np.exp(gone) * dt[:, j]
        return found

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Turned copies beside the originals, one scan, both results added at their places."""
        batch = int(self.batch)
        names = {"x": "x", "dt": "rdt", "b": "rb", "c": "rc"}
        turned = [inputs[name][:, ::-1] for name in names.values()]
        flat = np.concatenate([values.reshape(-1) for values in turned])
        copies = np.split(moved(step, self.turn(), flat), np.cumsum([t.size for t in turned])[:-1])
        given = {
            name: np.concatenate([inputs[name], copy.reshape(inputs[name].shape)])
            for name, copy in zip(names, copies, strict=True)
        }
        y = step(self.scan(), given | {name: inputs[name] for name in ("a", "bias")})["y"]
        both = {"f": y[:batch], "r": y[batch:, ::-1]}
        return step(self.merge(), both | {"x": inputs["x"], "d": inputs["d"]})


@dataclass(frozen=True, kw_only=True)
class HydraLayer(StateSpaceLayer):
    """The mixer with what stands around it: one projection, a convolution, d, a gated norm.

    d_t = x_t W_d + D, a number a head. The convolution has `width` taps around a token: a causal
    one over len_seq + width // 2 tokens. Norm before gate, as in the authors' code.

    >>> op = HydraLayer(len_seq=512, num_heads=24)           # BERT's width: dim = 768
    >>> op.weights() == 768 * (2 * 1536 + 4 * 64 + 48 + 1536) + 1792 * 7 + 1536 * 25
    True
    """

    name: ClassVar[str] = "hydra_layer"
    state_dim: Num = 64
    width: Num = 7

    def check(self) -> None:
        """What a scan refuses."""
        self.mixer()

    def mixer(self) -> QuasiSeparable:
        """Both scans."""
        return QuasiSeparable(
            batch=self.batch, len_seq=self.len_seq, num_heads=self.num_heads,
            num_groups=self.num_groups, head_dim=self.head_dim, state_dim=self.state_dim,
            chunk=self.chunk, dtype=self.dtype,
        )  # fmt: skip

    @property
    def shared_cols(self) -> Num:
        """Columns of B, or of C, of one direction."""
        return self.num_groups * self.state_dim

    @property
    def conv_channels(self) -> Num:
        """Channels of the convolution: x, B and C of both directions."""
        return self.inner + 2 * DIRECTIONS * self.shared_cols

    @property
    def projected_cols(self) -> Num:
        """Columns of the projection: z, what is convolved, dt of both directions."""
        return self.inner + self.conv_channels + DIRECTIONS * self.num_heads

    def convolution(self) -> ShortConv:
        """Around each token."""
        return ShortConv(
            batch=self.batch, len_seq=self.len_seq + self.width // 2, channels=self.conv_channels,
            width=self.width, dtype=self.dtype,
        )  # fmt: skip

    def kernels(self) -> dict[str, ProvedOp]:
        """All stages by name, in the order they run."""
        return {
            "project": self.linear(self.projected_cols, self.model_dim),
            "convolve": self.convolution(),
            "diagonal": self.linear(self.num_heads, self.inner),
            "mix": self.mixer(),
            "norm": self.norm(),
            "gate": self.gate(),
            "output": self.linear(self.model_dim, self.inner),
        }

    def stages(self) -> tuple[Stage, ...]:
        """Every kernel once."""
        return tuple(Stage(name, op) for name, op in self.kernels().items())

    def weights(self) -> Num:
        """Numbers of the projections, the taps, the diagonal's map and the norm."""
        taps = self.conv_channels * self.width
        inside = self.inner * (self.num_heads + 1)
        return self.model_dim * (self.projected_cols + self.inner) + taps + inside

    def compulsory_bytes(self) -> Num:
        """Input, output and weights once."""
        moved_numbers = 2 * self.tokens * self.model_dim + self.weights()
        numbers = 2 * self.num_heads * FP32_BYTES
        return moved_numbers * self.dtype.bytes_per_element + numbers

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """u[batch, len_seq, dim] and the weights."""
        ops, d = self.kernels(), int(self.model_dim)
        found = {"u": rng.standard_normal((int(self.batch), int(self.len_seq), d))}
        for name in ("project", "diagonal", "output"):
            op = ops[name]
            assert isinstance(op, Matmul)
            found[name] = rng.standard_normal((int(op.k), int(op.n))) / int(op.k) ** 0.5
        found["taps"] = rng.standard_normal((int(self.conv_channels), int(self.width)))
        found["weight"] = rng.standard_normal(int(self.inner))
        return found | self.mixer().scan().head_inputs(rng)

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Stage by stage."""
        ops, i, heads = self.kernels(), int(self.inner), int(self.num_heads)
        columns = projected(step, ops["project"], inputs["u"], inputs["project"])
        z, xbc, dt = np.split(columns, [i, i + int(self.conv_channels)], axis=-1)
        later = int(self.width) // 2
        padded = np.pad(xbc, ((0, 0), (0, later), (0, 0)))
        mixed = step(ops["convolve"], {"x": padded, "w": inputs["taps"]})["y"][:, later:]
        x, *shared = np.split(mixed, [i + n * int(self.shared_cols) for n in range(4)], axis=-1)
        d = projected(step, ops["diagonal"], np.ascontiguousarray(x), inputs["diagonal"])
        groups = (*x.shape[:2], int(self.num_groups), int(self.state_dim))
        given = {
            "x": x.reshape(*x.shape[:2], heads, int(self.head_dim)),
            "dt": dt[..., :heads],
            "rdt": dt[..., heads:],
            "d": d,
        } | {n: v.reshape(groups) for n, v in zip(("b", "c", "rb", "rc"), shared, strict=True)}
        given |= {name: inputs[name] for name in ("a", "bias")}
        y = step(ops["mix"], given)["y"].reshape(z.shape)
        y = self.gated(step, z, self.normed(step, y, inputs["weight"]))
        return {"y": projected(step, ops["output"], y, inputs["output"])}

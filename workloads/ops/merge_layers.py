"""MiniCache's merge of two layers' keys or values (Liu et al. 2024, arXiv 2405.14366, section 4).

Of each token's vectors a and b, over all heads, spherical interpolation keeps one direction:

    W = arccos(a b / |a| |b|),   e = (sin((1 - t) W) a / |a| + sin(t W) b / |b|) / sin W

and the two lengths; the angle W ranks the tokens that are kept unmerged. Per token of c channels:

    vector  9 c + 10 (three products, the weighted sum)      special 7
    reads   2 c, twice where a token's vectors do not fit    writes  c + 2, and W in fp32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, floor, maximum, minimum, where
from workloads.op import LIMIT, Arrays, Stage, require_fit
from workloads.ops.cache_segment import WHOLE_BITS, share
from workloads.ops.quantise_groups import QuantiseGroups
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.streamed import Lanes, StreamedOp
from workloads.ops.top_k import TopK
from workloads.work import Work

TOWARDS: Final = 0.6
"""t of the interpolation, the paper's choice."""
STATISTICS_BYTES: Final = 64


@dataclass(frozen=True, kw_only=True)
class SlerpMerge(StreamedOp):
    """a, b [rows, cols] -> e [rows, cols], lengths [rows, 2], angle [rows, 1].

    >>> SlerpMerge(rows=10, cols=4096).work(2**17).vector_flops == 10 * (9 * 4096 + 10)
    True
    """

    name: ClassVar[str] = "slerp_merge"
    rows: Num
    cols: Num
    dtype: DType = BF16

    def elements(self) -> Num:
        """Of one layer."""
        return self.rows * self.cols

    def read_bytes(self) -> Num:
        """Two layers' elements."""
        return 2 * self.dtype.bytes_per_element

    def write_bytes(self) -> Num:
        """A direction's element, and its share of the lengths and the angle."""
        e = self.dtype.bytes_per_element
        return e + (2 * e + FP32.bytes_per_element) / self.cols

    def steps(self) -> tuple[Num, Num]:
        """The module's counts by element."""
        return 9 + 10 / self.cols, 7 / self.cols

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Channels per `chunk`; 2 `passes` where it is not a whole token."""
        held = 3 * self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, STATISTICS_BYTES + held, "one channel of two layers")
        chunk = floor((minimum(fast_bytes, LIMIT) - STATISTICS_BYTES) / held)
        return {
            "chunk": minimum(chunk, self.cols),
            "passes": where(chunk >= self.cols, 1, 2),
        }

    def work(self, fast_bytes: Num) -> Work:
        """The module's counts."""
        e, passes = self.dtype.bytes_per_element, self.tiling(fast_bytes)["passes"]
        return Work(
            vector_flops=self.rows * (9 * self.cols + 10),
            special_ops=7 * self.rows,
            read_bytes=passes * 2 * self.elements() * e,
            write_bytes=self.rows * ((self.cols + 2) * e + FP32.bytes_per_element),
        )

    def compulsory_bytes(self) -> Num:
        """Both layers, directions, lengths and angles once."""
        e = self.dtype.bytes_per_element
        return self.rows * ((3 * self.cols + 2) * e + FP32.bytes_per_element)

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random vectors."""
        shape = int(self.rows), int(self.cols)
        return {"a": rng.standard_normal(shape), "b": rng.standard_normal(shape)}

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy, by unit vectors."""
        a, b = inputs["a"], inputs["b"]
        lengths = np.stack([np.linalg.norm(x, axis=1) for x in (a, b)], axis=1)
        units = a / lengths[:, :1], b / lengths[:, 1:]
        angle = np.arccos((units[0] * units[1]).sum(axis=1, keepdims=True))
        mixed = np.sin((1 - TOWARDS) * angle) * units[0] + np.sin(TOWARDS * angle) * units[1]
        return {"e": mixed / np.sin(angle), "lengths": lengths, "angle": angle}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, token by token."""
        a, b = (machine.place(inputs[name], self.dtype) for name in ("a", "b"))
        e = machine.empty(inputs["a"].shape, self.dtype)
        lengths = machine.empty((int(self.rows), 2), self.dtype)
        angle = machine.empty((int(self.rows), 1), FP32)
        parts = slices(int(self.cols), int(self.tiling(machine.fast_bytes)["chunk"]))
        with machine.kernel():
            for row in range(int(self.rows)):
                with machine.scope():
                    _merge_row(machine, (a, b, e, lengths, angle), row, parts)
        return {"e": e.values, "lengths": lengths.values, "angle": angle.values}


def _merge_row(mc: Machine, arrays: tuple[SlowArray, ...], row: int, parts: list[slice]) -> None:
    """Products of the two vectors, the weights they give, the weighted sum."""
    a, b, e, lengths, angle = arrays
    whole = [mc.load(x, (row, parts[0])) for x in (a, b)] if len(parts) == 1 else None
    sums = mc.full((3,), 0.0)
    for part in parts:
        with mc.scope():
            x, y = (t.values for t in whole or [mc.load(s, (row, part)) for s in (a, b)])
            added = sums.values + np.array([x @ x, y @ y, x @ y])
            mc.vector(added, per_element=2 * x.size, into=sums)
    squares = [Lanes(mc, sums.values[i : i + 1]) for i in range(3)]
    inverse = [s.rsqrt() for s in squares[:2]]
    long = [squares[i] * inverse[i] for i in range(2)]
    cosine = squares[2] * inverse[0] * inverse[1]
    turn = Lanes(mc, mc.special(np.arccos(cosine.values)).values)
    weights = []
    scale = _sine(mc, turn).reciprocal()
    for share_of, length in zip((1 - TOWARDS, TOWARDS), inverse, strict=True):
        weights.append((_sine(mc, turn * share_of) * scale * length).values)
    for part in parts:
        with mc.scope():
            x, y = (t.values for t in whole or [mc.load(s, (row, part)) for s in (a, b)])
            mixed = mc.vector(weights[0] * x + weights[1] * y, per_element=3, dtype=e.dtype)
            mc.store(mixed, e, (row, part))
    both = mc.hold(np.concatenate([n.values for n in long]), lengths.dtype)
    mc.store(both, lengths, row)
    mc.store(turn.keep(FP32), angle, row)


def _sine(mc: Machine, angle: Lanes) -> Lanes:
    mc.count(special=angle.values.size)
    return Lanes(mc, np.sin(angle.values))


@dataclass(frozen=True, kw_only=True)
class MergeLayers(ProvedStagedOp):
    """One pair of layers: keys and values merged, the tokens to keep unmerged found, codes.

    >>> op = MergeLayers(num_kv_heads=32, len_kv=1000, head_dim=128)
    >>> [stage.name for stage in op.stages()]
    ['merge_k', 'retain_k', 'quantise_k', 'merge_v', 'retain_v', 'quantise_v']
    """

    name: ClassVar[str] = "merge_layers"
    cheaper: ClassVar[tuple[str, ...]] = ("group_size", "bits")
    batch: Num = 1
    num_kv_heads: Num
    len_kv: Num
    head_dim: Num
    retained_frac: Num = 0.05
    bits: Num = 4
    group_size: Num | None = None
    zero_point: bool = False
    scale_bits: Num = 16
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """Keys, then values; directions in 16 bits are not quantised."""
        tokens = self.batch * self.len_kv
        merge = SlerpMerge(rows=tokens, cols=self.num_kv_heads * self.head_dim, dtype=self.dtype)
        kept = maximum(share(self.retained_frac, self.len_kv), 1)
        retain = TopK(rows=self.batch, cols=self.len_kv, k=kept)
        found = []
        for side in ("k", "v"):
            found += [Stage(f"merge_{side}", merge), Stage(f"retain_{side}", retain)]
            if np.min(self.bits) < WHOLE_BITS:
                coded = QuantiseGroups(
                    rows=tokens * self.num_kv_heads, cols=self.head_dim, bits=self.bits,
                    group=self.group_size, zero_point=self.zero_point,
                    scale_bits=self.scale_bits, dtype=self.dtype,
                )  # fmt: skip
                found.append(Stage(f"quantise_{side}", coded))
        return tuple(found)

    def compulsory_bytes(self) -> Num:
        """Both layers' keys and values once."""
        heads = self.batch * self.len_kv * self.num_kv_heads
        return 4 * heads * self.head_dim * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Keys and values of both layers, a token's heads side by side."""
        merge = SlerpMerge(rows=self.batch * self.len_kv, cols=self.num_kv_heads * self.head_dim)
        return {
            f"{name}_{side}": value
            for side in ("k", "v")
            for name, value in merge.inputs(rng).items()
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The stages' references in turn."""
        return self._chain(inputs, None)

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        return self._chain(inputs, machine)

    def _chain(self, inputs: Arrays, machine: Machine | None) -> Arrays:
        found: dict[str, Values] = {}
        ops = {stage.name: stage.op for stage in self.stages()}

        def run(name: str, arrays: Arrays) -> Arrays:
            op = ops[name]
            assert isinstance(op, (StreamedOp, TopK))
            return op.program(machine, arrays) if machine else op.reference(arrays)

        for side in ("k", "v"):
            pair = {name: inputs[f"{name}_{side}"] for name in ("a", "b")}
            merged = dict(run(f"merge_{side}", pair))
            angles = merged.pop("angle").reshape(int(self.batch), -1)
            merged["retained"] = run(f"retain_{side}", {"x": angles})["index"]
            if f"quantise_{side}" in ops:
                rows = merged.pop("e").reshape(-1, int(self.head_dim))
                merged |= run(f"quantise_{side}", {"x": rows})
            found |= {f"{name}_{side}": value for name, value in merged.items()}
        return found

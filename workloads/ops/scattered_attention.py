"""ScatterFormer: linear attention inside windows of unequal numbers of voxels, nothing padded.

He et al. 2024 (arXiv 2401.00912, scattered linear attention). The N voxels of a scene lie behind
each other in the order of their windows; a window w of n_w voxels and a head attend

    C_w = sum_j phi(k_j) v_j^T,   s_w = sum_j phi(k_j),   o_i = phi(q_i) C_w / phi(q_i) . s_w

A block takes one window and head, walks its voxels in groups of `group` with C_w and s_w in fast
memory, and writes them; a second kernel reads them back for the window's queries. Since groups are
cut off at the window's end, only the sums of the lengths count, not how they are spread. With M
windows, H heads of width d:

    products   4 N H d^2                (a window's keys, then its queries)
    vector     4 N H d                  sum of keys; product with s_w, its sum, division
    bytes      4 N H d e + 2 M H ((d^2 + d) e + 8)       an offset and a length each time

and phi is `relu` (kernels of their own, as the authors run it). Ignored: the sort of voxels by
window (once for the layers that share windows), summing C_w over neighbouring windows, the
projections and the convolution around the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.feature_map import RELU, KernelFeatures
from workloads.ops.flash_attention import transposed
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.streamed import Lanes
from workloads.ops.top_k import INDEX
from workloads.work import Work

FP32_BYTES = FP32.bits // 8
PLACE_BYTES = 2 * INDEX.bytes_per_element
"""Where a window starts and how long it is."""


@dataclass(frozen=True, kw_only=True)
class _Windows(ProvedOp):
    """Arrays [num_voxels, num_heads, head_dim] in `num_windows` windows; `places`[windows, 2]."""

    cheaper: ClassVar[tuple[str, ...]] = ("num_windows",)  # shorter ones: more blocks side by side
    num_voxels: Num
    num_windows: Num
    num_heads: Num
    head_dim: Num
    group: Num = 32
    dtype: DType = BF16

    def check(self) -> None:
        """Windows without a voxel are not listed."""
        if any_true(np.greater(self.num_windows, self.num_voxels)):
            raise InputError(
                f"{self.name}: num_windows = {np.max(self.num_windows):g} is more than the "
                f"num_voxels = {np.min(self.num_voxels):g} there are; leave out empty windows"
            )

    @property
    def blocks_in_all(self) -> Num:
        """A window and a head each."""
        return self.num_windows * self.num_heads

    @property
    def mean_length(self) -> Num:
        """Voxels of a window, rounded up."""
        return ceil_div(self.num_voxels, self.num_windows)

    def array_bytes(self) -> Num:
        """One array of all voxels."""
        elements = self.num_voxels * self.num_heads * self.head_dim
        return elements * self.dtype.bytes_per_element

    def state_bytes(self) -> Num:
        """C and s of all windows and heads."""
        state = self.head_dim * (self.head_dim + 1)
        return self.blocks_in_all * state * self.dtype.bytes_per_element

    def places_bytes(self) -> Num:
        """Offsets and lengths as all blocks read them."""
        return self.blocks_in_all * PLACE_BYTES

    def group_tiling(self, fast_bytes: Num, held: Num, row: Num) -> Mapping[str, Num]:
        """Voxels of a group beside what stays."""
        require_fit(
            self.name, fast_bytes, held + row, "the matrix of a window and one voxel",
            "take a smaller head_dim",
        )  # fmt: skip
        return {"rows": minimum(self.group, floor((fast_bytes - held) / row))}

    def random_windows(self, rng: np.random.Generator) -> Values:
        """Offsets and lengths of windows of random sizes, none empty."""
        n, m = int(self.num_voxels), int(self.num_windows)
        cuts = np.sort(rng.choice(np.arange(1, n), m - 1, replace=False))
        offsets = np.concatenate([[0], cuts])
        return np.stack([offsets, np.diff(np.append(offsets, n))], axis=1).astype(np.float64)

    def random_array(self, rng: np.random.Generator) -> Values:
        """[num_voxels, num_heads, head_dim]."""
        return rng.standard_normal([int(n) for n in self._shape()])

    def _shape(self) -> tuple[Num, ...]:
        return self.num_voxels, self.num_heads, self.head_dim

    def groups(self, machine: Machine, place: Values) -> list[slice]:
        """The voxels of a window, group by group."""
        first, count = (int(n) for n in place)
        step = int(self.tiling(machine.fast_bytes)["rows"])
        return [slice(first + s.start, first + s.stop) for s in slices(count, step)]


@dataclass(frozen=True, kw_only=True)
class WindowStates(_Windows):
    """C = sum of k v^T and s = sum of k of every window and head.

    >>> op = WindowStates(num_voxels=60000, num_windows=2000, num_heads=8, head_dim=16)
    >>> op.work(2**16).tensor_flops[BF16] == 2 * 60000 * 8 * 16**2
    True
    """

    name: ClassVar[str] = "window_states"

    def stages(self) -> tuple[Stage, ...]:
        """Products of windows of the mean length; the sum of keys is one more column."""
        one = BatchedMatmul(
            batch=self.blocks_in_all, m=self.head_dim, n=self.head_dim + 1, k=self.mean_length,
            dtype=self.dtype,
        )  # fmt: skip
        return (Stage("states", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """A group of keys and values beside both sums."""
        d = self.head_dim
        held = d * (d + 1) * FP32_BYTES + PLACE_BYTES
        return self.group_tiling(fast_bytes, held, 2 * d * self.dtype.bytes_per_element)

    def work(self, fast_bytes: Num) -> Work:
        """Keys and values once, sums written; as many additions as keys have elements."""
        self.tiling(fast_bytes)
        elements = self.num_voxels * self.num_heads * self.head_dim
        return Work(
            tensor_flops={self.dtype: 2 * elements * self.head_dim},
            vector_flops=elements,
            read_bytes=2 * self.array_bytes() + self.places_bytes(),
            write_bytes=self.state_bytes(),
        )

    def compulsory_bytes(self) -> Num:
        """Keys, values, places and sums once."""
        places = self.num_windows * PLACE_BYTES
        return 2 * self.array_bytes() + self.state_bytes() + places

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """k, v and places."""
        found = {name: self.random_array(rng) for name in ("k", "v")}
        return found | {"places": self.random_windows(rng)}

    def reference(self, inputs: Arrays) -> Arrays:
        """Window after window."""
        parts = [slice(int(a), int(a + n)) for a, n in inputs["places"]]
        k, v = inputs["k"], inputs["v"]
        products = [np.einsum("nhd,nhe->hde", k[part], v[part]) for part in parts]
        return {"c": np.stack(products), "s": np.stack([k[part].sum(0) for part in parts])}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, a window and a head at a time."""
        places = machine.place(inputs["places"], INDEX)
        k, v = (machine.place(inputs[name], self.dtype) for name in ("k", "v"))
        m, h, d = (int(n) for n in (self.num_windows, self.num_heads, self.head_dim))
        c, s = machine.empty((m, h, d, d), self.dtype), machine.empty((m, h, d), self.dtype)
        with machine.kernel():
            for at in np.ndindex(m, h):
                with machine.scope():
                    self._block(machine, (places, k, v), (c, s), at)
        return {"c": c.values, "s": s.values}

    def _block(
        self, mc: Machine, given: tuple[SlowArray, ...], found: tuple[SlowArray, SlowArray],
        at: tuple[int, ...],
    ) -> None:  # fmt: skip
        (places, k, v), (window, head), d = given, at, int(self.head_dim)
        place = mc.load(places, window)
        c, s = mc.full((d, d), 0.0), mc.full((1, d), 0.0)
        for part in self.groups(mc, place.values):
            with mc.scope():
                keys, values = mc.load(k, (part, head)), mc.load(v, (part, head))
                Lanes(mc, keys.values).sum(0).gather(s)
                with transposed(keys):
                    mc.matmul(keys, values, self.dtype, into=c)
        for tile, target in zip((c, s), found, strict=True):
            mc.store(tile, target, at)


@dataclass(frozen=True, kw_only=True)
class WindowReadout(_Windows):
    """o = q C / q . s of every voxel, with the C and s of its window and head.

    >>> op = WindowReadout(num_voxels=60000, num_windows=2000, num_heads=8, head_dim=16)
    >>> op.work(2**16).write_bytes == 60000 * 8 * 16 * 2
    True
    """

    name: ClassVar[str] = "window_readout"

    def stages(self) -> tuple[Stage, ...]:
        """Products of windows of the mean length; q . s is one more column."""
        one = BatchedMatmul(
            batch=self.blocks_in_all, m=self.mean_length, n=self.head_dim + 1, k=self.head_dim,
            dtype=self.dtype,
        )  # fmt: skip
        return (Stage("readout", one),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """A group of queries and outputs beside both sums."""
        d, e = self.head_dim, self.dtype.bytes_per_element
        return self.group_tiling(
            fast_bytes, d * (d + 1) * e + PLACE_BYTES, d * (e + FP32_BYTES)
        )  # fmt: skip

    def work(self, fast_bytes: Num) -> Work:
        """Queries and sums in, outputs out."""
        self.tiling(fast_bytes)
        rows = self.num_voxels * self.num_heads
        return Work(
            tensor_flops={self.dtype: 2 * rows * self.head_dim * self.head_dim},
            vector_flops=3 * rows * self.head_dim,
            special_ops=rows,
            read_bytes=self.array_bytes() + self.state_bytes() + self.places_bytes(),
            write_bytes=self.array_bytes(),
        )

    def compulsory_bytes(self) -> Num:
        """Queries, outputs, places and sums once."""
        places = self.num_windows * PLACE_BYTES
        return 2 * self.array_bytes() + self.state_bytes() + places

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q and s above zero, C, places."""
        m, h, d = (int(n) for n in (self.num_windows, self.num_heads, self.head_dim))
        return {
            "q": np.abs(self.random_array(rng)) + 0.1,
            "c": rng.standard_normal((m, h, d, d)),
            "s": rng.random((m, h, d)) + 0.1,
            "places": self.random_windows(rng),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """Every voxel with a copy of its window's sums."""
        own = np.repeat(np.arange(len(inputs["s"])), inputs["places"][:, 1].astype(np.int64))
        o = np.einsum("nhd,nhde->nhe", inputs["q"], inputs["c"][own])
        return {"o": o / (inputs["q"] * inputs["s"][own]).sum(-1, keepdims=True)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, a window and a head at a time."""
        places = machine.place(inputs["places"], INDEX)
        q, c, s = (machine.place(inputs[name], self.dtype) for name in ("q", "c", "s"))
        o = machine.empty(inputs["q"].shape, self.dtype)
        with machine.kernel():
            for at in np.ndindex(*inputs["s"].shape[:2]):
                with machine.scope():
                    self._block(machine, (places, q, c, s), o, at)
        return {"o": o.values}

    def _block(
        self, mc: Machine, given: tuple[SlowArray, ...], o: SlowArray, at: tuple[int, ...]
    ) -> None:
        (places, q, c, s), (window, head) = given, at
        place = mc.load(places, window)
        state, total = mc.load(c, at), Lanes(mc, mc.load(s, at).values)
        for part in self.groups(mc, place.values):
            with mc.scope():
                queries = mc.load(q, (part, head))
                out = mc.matmul(queries, state, self.dtype)
                inverse = (Lanes(mc, queries.values) * total).sum(-1).reciprocal()
                mc.store((Lanes(mc, out.values) * inverse).into(out), o, (part, head))


@dataclass(frozen=True, kw_only=True)
class ScatteredAttention(SteppedOp):
    """Q, K, V, O[num_voxels, num_heads, head_dim] in `num_windows` windows; phi is `relu`.

    How many windows a scene fills is a matter of the data.

    >>> op = ScatteredAttention(num_voxels=60000, num_windows=2000, num_heads=8, head_dim=16)
    >>> op.min_flops()[BF16] == 4 * 60000 * 8 * 16**2
    True
    """

    name: ClassVar[str] = "scattered_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_windows",)
    num_voxels: Num
    num_windows: Num
    num_heads: Num
    head_dim: Num
    group: Num = 32
    dtype: DType = BF16

    def check(self) -> None:
        """As the kernels."""
        try:
            self.kernels()
        except InputError as why:
            text = str(why).removeprefix(f"{WindowStates.name}: ")
            raise InputError(f"{self.name}: {text}") from None

    def kernels(self) -> tuple[KernelFeatures, WindowStates, WindowReadout]:
        """phi, the sums of the windows, what their queries read."""
        given = {
            "num_voxels": self.num_voxels, "num_windows": self.num_windows,
            "num_heads": self.num_heads, "head_dim": self.head_dim, "group": self.group,
        }  # fmt: skip
        features = KernelFeatures(
            rows=self.num_voxels * self.num_heads, dim=self.head_dim, feature=RELU,
            dtype=self.dtype,
        )  # fmt: skip
        states = WindowStates(**given, dtype=self.dtype)
        return features, states, WindowReadout(**given, dtype=self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """phi of queries and of keys, sums, readout."""
        features, states, readout = self.kernels()
        return (
            Stage("features", features, 2), Stage("states", states), Stage("readout", readout)
        )  # fmt: skip

    def compulsory_bytes(self) -> Num:
        """Q, K, V, O and places once."""
        _, states, _ = self.kernels()
        return 4 * states.array_bytes() + self.num_windows * PLACE_BYTES

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v and places."""
        _, states, _ = self.kernels()
        return {**states.inputs(rng), "q": states.random_array(rng)}

    def reference(self, inputs: Arrays) -> Arrays:
        """All weights of a window written out, then normalised."""
        features, _, _ = self.kernels()
        d = int(self.head_dim)
        phi = {n: features.reference({"x": inputs[n].reshape(-1, d)})["y"] for n in ("q", "k")}
        o = np.empty_like(inputs["v"])
        for first, count in inputs["places"].astype(np.int64):
            part = slice(first, first + count)
            q, k = (phi[n].reshape(inputs[n].shape)[part] for n in ("q", "k"))
            weight = np.einsum("ihd,jhd->hij", q, k)
            weight = weight / weight.sum(-1, keepdims=True)
            o[part] = np.einsum("hij,jhd->ihd", weight, inputs["v"][part])
        return {"o": o}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """The stages in turn."""
        features, states, readout = self.kernels()
        d, shape = int(self.head_dim), inputs["q"].shape
        phi = {n: step(features, {"x": inputs[n].reshape(-1, d)})["y"] for n in ("q", "k")}
        places = {"places": inputs["places"]}
        sums = step(states, {"k": phi["k"].reshape(shape), "v": inputs["v"], **places})
        return {"o": step(readout, {"q": phi["q"].reshape(shape), **sums, **places})["o"]}

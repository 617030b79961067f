"""ShadowKV: low-rank keys on the device, values in the host's memory, chunks chosen by landmarks.

Sun et al. 2024 (arXiv 2410.21465, algorithms 1 and 2). Prefill factors the keys of all heads before
their rotation, [N, heads d] = A[N, r] B[r, heads d], keeps chunk means ("landmarks") of the rotated
keys, sends V to the host, and keeps on the device the chunks whose keys lie farthest from their
mean (outliers) and the last ones. A decoding step, for each K and V head with its G query heads
and L landmarks:

    score    P = softmax(q M^T) over the landmarks, the largest of the G heads   2 G L d flops
    select   the k chunks of the largest
    recover  those not left by the step before: K = rotate(A[chunk] B)            2 t r d flops
             beside it their V over the link to the host                         t d e bytes
    attend   the k chunks, outliers and last ones

where t = missed chunks x chunk tokens, missed = k - floor(`hit_frac` k). On the device stay
N r e bytes of A for all heads, and per head N d / chunk of landmarks and the attended rows of K
and V; N d bytes of V per head on the host.

The sizes of a chunk, the rank and the outliers are the paper's (8, 160, 48); `hit_frac` 0.6 is what
it states of the cache of selections ("over 60 %"). Ignored: comparing the lists of two steps,
rounding in the rotation's own kernel (the paper fuses product and rotation), new tokens' landmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, any_true, floor, maximum, minimum, where
from workloads.op import Arrays, Stage
from workloads.ops.block_pool import BlockPool
from workloads.ops.counted import CountedOp
from workloads.ops.host_copy import HostCopy
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.rope import Rope
from workloads.ops.selected_attention import SelectedAttention
from workloads.ops.softmax import Softmax
from workloads.ops.staged import ProvedStagedOp, StagedOp
from workloads.ops.top_k import INDEX, TopK


@dataclass(frozen=True, kw_only=True)
class RecoverChunks(ProvedStagedOp):
    """Keys of `num_tokens` positions a list from their factors, and their values from the host.

    a[lists, num_tokens, rank], b[lists, rank, head_dim], v[lists, num_tokens, head_dim]. The copy
    over the link runs beside the product.

    >>> work = RecoverChunks(lists=8, num_tokens=824, head_dim=128).work(2**18)
    >>> work.tensor_flops[BF16] == 2 * 8 * 824 * 160 * 128, work.host_bytes == 8 * 824 * 128 * 2
    (True, True)
    """

    name: ClassVar[str] = "recover_chunks"
    lists: Num
    num_tokens: Num
    head_dim: Num
    rank: Num = 160
    dtype: DType = BF16

    def product(self) -> BatchedMatmul:
        """A B for every list."""
        return BatchedMatmul(
            batch=self.lists, m=self.num_tokens, n=self.head_dim, k=self.rank, dtype=self.dtype
        )

    def rotation(self) -> Rope:
        """Every key at its own position."""
        return Rope(
            num_tokens=self.lists * self.num_tokens, num_heads=1, head_dim=self.head_dim,
            dtype=self.dtype,
        )  # fmt: skip

    def value_bytes(self) -> Num:
        """Over the link."""
        return self.lists * self.num_tokens * self.head_dim * self.dtype.bytes_per_element

    def stages(self) -> tuple[Stage, ...]:
        """Keys, and beside them values."""
        return (
            Stage("product", self.product()), Stage("rotate", self.rotation()),
            Stage("fetch", HostCopy(num_bytes=self.value_bytes()), beside=True),
        )  # fmt: skip

    def compulsory_bytes(self) -> Num:
        """Factors read, keys and values written, tables of the rotation read."""
        e = self.dtype.bytes_per_element
        factors = self.lists * self.rank * (self.num_tokens + self.head_dim) * e
        tables = self.lists * self.num_tokens * self.head_dim * FP32.bytes_per_element
        return factors + tables + 2 * self.value_bytes()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Factors, values and the angles' tables [lists num_tokens, head_dim / 2]."""
        lists, tokens, dim = (int(n) for n in (self.lists, self.num_tokens, self.head_dim))
        tables = self.rotation().inputs(rng)
        return dict(self.product().inputs(rng)) | {
            "v": rng.standard_normal((lists, tokens, dim)),
            "cos": tables["cos"], "sin": tables["sin"],
        }  # fmt: skip

    def _turned(self, keys: Values, inputs: Arrays) -> dict[str, Values]:
        """What the rotation takes: [lists num_tokens, 1, head_dim] and its tables."""
        flat = keys.reshape(-1, 1, int(self.head_dim))
        return {"x": flat, "cos": inputs["cos"], "sin": inputs["sin"]}

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy."""
        keys = self._turned(inputs["a"] @ inputs["b"], inputs)
        k = self.rotation().reference(keys)["y"].reshape(inputs["v"].shape)
        return {"k": k, "v": inputs["v"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Product, rotation, and the arrival of the values."""
        product = self.product().program(machine, inputs)["c"]
        k = self.rotation().program(machine, self._turned(product, inputs))["y"]
        v = machine.empty((inputs["v"].size,), self.dtype)
        room = int(machine.fast_bytes // self.dtype.bytes_per_element)
        with machine.kernel():
            for part in slices(v.values.size, room):
                with machine.scope():  # what comes over the link was never in slow memory
                    machine.store(machine.hold(inputs["v"].ravel()[part], self.dtype), v, part)
        return {"k": k.reshape(inputs["v"].shape), "v": v.values.reshape(inputs["v"].shape)}


@dataclass(frozen=True, kw_only=True)
class ShadowKvDecode(ProvedStagedOp):
    """One new token of each of `batch` sequences of `len_kv` tokens. Chunk counts as fields.

    Fewer chunks than the fields ask for are taken where a sequence is short: all but one of them
    may stay on the device, all that have landmarks may be selected. What remains of len_kv beyond
    whole chunks stays with the last ones. Landmarks are kept divided by sqrt(head_dim).

    >>> op = ShadowKvDecode(batch=24, num_heads=32, num_kv_heads=8, len_kv=122 * 1024, head_dim=128)
    >>> op.num_landmarks, op.num_missed, op.len_attended
    (15564, 103, 2464)
    >>> round(op.full_cache_bytes() / op.cache_bytes(), 2)
    6.22
    """

    name: ClassVar[str] = "shadow_kv_decode"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads", "chunk")
    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_kv: Num
    head_dim: Num
    rank: Num = 160
    chunk: Num = 8
    num_selected: Num = 256
    num_outliers: Num = 48
    num_local: Num = 4
    hit_frac: Num = 0.6
    dtype: DType = BF16

    def check(self) -> None:
        """Heads that divide, dimensions in pairs, two chunks, a rank that saves something."""
        if any_true(self.num_heads % self.kv_heads != 0):
            raise InputError(
                f"{self.name}: num_kv_heads = {self.num_kv_heads} must divide "
                f"num_heads = {self.num_heads}"
            )
        if any_true(self.head_dim % 2 != 0):
            raise InputError(
                f"{self.name}: head_dim = {self.head_dim} must be even: keys are rotated in pairs"
            )
        if any_true(self.len_kv < 2 * self.chunk):
            raise InputError(
                f"{self.name}: len_kv = {self.len_kv} must hold two chunks of {self.chunk}; "
                f"give a longer sequence or a smaller chunk"
            )
        if any_true(self.rank > self.kv_heads * self.head_dim):
            raise InputError(
                f"{self.name}: rank = {self.rank} is more than the num_kv_heads x head_dim = "
                f"{self.kv_heads * self.head_dim} columns of the keys; give a smaller rank"
            )

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_lists(self) -> Num:
        """Selections of a step: one a sequence and K and V head."""
        return self.batch * self.kv_heads

    @property
    def group(self) -> Num:
        """Query heads that share a selection."""
        return self.num_heads // self.kv_heads

    @property
    def num_resident(self) -> Num:
        """Chunks that stay on the device: outliers and the last ones."""
        return minimum(self.num_outliers + self.num_local, self.len_kv // self.chunk - 1)

    @property
    def num_landmarks(self) -> Num:
        """Chunks to choose from."""
        return self.len_kv // self.chunk - self.num_resident

    @property
    def num_chosen(self) -> Num:
        """Chunks chosen."""
        return minimum(self.num_selected, self.num_landmarks)

    @property
    def num_missed(self) -> Num:
        """Of them, those that the step before did not choose; may be none."""
        return self.num_chosen - floor(self.hit_frac * self.num_chosen + 1e-9)

    @property
    def len_attended(self) -> Num:
        """Tokens that a query sees."""
        chunks = self.num_resident + self.num_chosen
        return chunks * self.chunk + self.len_kv % self.chunk

    # ---- memory ----------------------------------------------------------------------------

    def cache_bytes(self) -> Num:
        """On the device, of one layer: A, B, landmarks, and the rows that are attended to."""
        per_list = (self.num_landmarks + 2 * self.len_attended + self.rank) * self.head_dim
        elements = self.batch * self.len_kv * self.rank + self.num_lists * per_list
        return elements * self.dtype.bytes_per_element

    def host_cache_bytes(self) -> Num:
        """On the host, of one layer: all values."""
        rows = self.num_lists * self.len_kv
        return rows * self.head_dim * self.dtype.bytes_per_element

    def full_cache_bytes(self) -> Num:
        """What plain attention keeps on the device."""
        return 2 * self.host_cache_bytes()

    # ---- stages ----------------------------------------------------------------------------

    def scores(self) -> BatchedMatmul:
        """q M^T for every list."""
        return BatchedMatmul(
            batch=self.num_lists, m=self.group, n=self.num_landmarks, k=self.head_dim,
            dtype=self.dtype,
        )  # fmt: skip

    def softmax(self) -> Softmax:
        """Over the landmarks, for each query head."""
        rows = self.batch * self.num_heads
        return Softmax(rows=rows, cols=self.num_landmarks, dtype=self.dtype)

    def largest(self) -> BlockPool:
        """The largest of a group's heads."""
        return BlockPool(
            batch=self.num_lists, len_seq=self.group, dim=self.num_landmarks, block=self.group,
            dtype=self.dtype, kind="max",
        )  # fmt: skip

    def select(self) -> TopK:
        """The chunks of a list."""
        return TopK(
            rows=self.num_lists, cols=self.num_landmarks, k=self.num_chosen, dtype=self.dtype
        )

    def recover(self) -> RecoverChunks:
        """The chunks that are missed; at least one, which may run no time at all."""
        return RecoverChunks(
            lists=self.num_lists, num_tokens=maximum(self.num_missed, 1) * self.chunk,
            head_dim=self.head_dim, rank=self.rank, dtype=self.dtype,
        )  # fmt: skip

    def attend(self) -> SelectedAttention:
        """Over slots of chunks that lie side by side."""
        return SelectedAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_kv=self.len_attended, len_selected=self.len_attended, head_dim=self.head_dim,
            block_k=self.chunk, dtype=self.dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Score, select, recover, attend. A group of one head needs no maximum."""
        return (
            Stage("scores", self.scores()), Stage("softmax", self.softmax()),
            Stage("largest", self.largest(), times=where(self.group > 1, 1, 0)),
            Stage("select", self.select()),
            Stage("recover", self.recover(), times=where(self.num_missed > 0, 1, 0)),
            Stage("attend", self.attend()),
        )  # fmt: skip

    def compulsory_bytes(self) -> Num:
        """q, o, landmarks, the rows attended to, and rows of A for the missed tokens.

        A row of A serves all heads of a sequence, whose lists may coincide.
        """
        e = self.dtype.bytes_per_element
        rows = self.num_lists * (self.num_landmarks + 2 * self.len_attended)
        factor = self.batch * self.num_missed * self.chunk * self.rank
        return e * (self.head_dim * (rows + 2 * self.batch * self.num_heads) + factor)

    # ---- proof -----------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q[batch, num_heads, 1, d], landmarks and the chunks they stand for, factors, V, rows.

        landmarks[lists, num_landmarks, d], chunks[lists, num_landmarks], a[batch, len_kv, rank],
        b[lists, rank, d], v[lists, len_kv, d], k_resident and v_resident, cos and sin by position.
        """
        lists, dim, length = int(self.num_lists), int(self.head_dim), int(self.len_kv)
        landmarks = int(self.num_landmarks)
        tables = Rope(num_tokens=length, num_heads=1, head_dim=dim).inputs(rng)
        chunks = [rng.permutation(length // int(self.chunk))[:landmarks] for _ in range(lists)]
        stay = (lists, int(self.len_attended - self.num_chosen * self.chunk), dim)
        return {
            "q": rng.standard_normal((int(self.batch), int(self.num_heads), 1, dim)),
            "landmarks": rng.standard_normal((lists, landmarks, dim)),
            "chunks": np.stack(chunks).astype(np.float64),
            "a": rng.standard_normal((int(self.batch), length, int(self.rank))),
            "b": rng.standard_normal((lists, int(self.rank), dim)),
            "v": rng.standard_normal((lists, length, dim)),
            "k_resident": rng.standard_normal(stay),
            "v_resident": rng.standard_normal(stay),
            "cos": tables["cos"], "sin": tables["sin"],
        }  # fmt: skip

    def _addressed(self, inputs: Arrays, index: Values) -> dict[str, Values]:
        """What recovering reads for landmarks index[lists, n]: rows of A, B, V and the tables."""
        lists = np.arange(int(self.num_lists))
        chunks = np.take_along_axis(inputs["chunks"], index.astype(np.int64), axis=1)
        size = int(self.chunk)
        tokens = (chunks.astype(np.int64)[..., None] * size + np.arange(size)).reshape(
            len(lists), -1
        )
        owner = lists // int(self.kv_heads)
        tables = {n: inputs[n][tokens.ravel()] for n in ("cos", "sin")}
        rows = {"a": inputs["a"][owner[:, None], tokens], "v": inputs["v"][lists[:, None], tokens]}
        return {**rows, **tables, "b": inputs["b"]}

    def _attention_inputs(self, inputs: Arrays, parts: list[Arrays]) -> dict[str, Values]:
        """Resident rows and parts side by side, each list's slots in order."""
        op = self.attend()
        shape = (int(self.batch), int(self.kv_heads), int(self.len_attended), int(self.head_dim))
        rows = {
            n: np.concatenate([part[n] for part in parts] + [inputs[f"{n}_resident"]], axis=1)
            for n in ("k", "v")
        }
        slots = np.arange(-(-int(op.len_selected) // int(op.block_k)), dtype=np.float64)
        return {
            "q": inputs["q"], "k": rows["k"].reshape(shape), "v": rows["v"].reshape(shape),
            "index": np.tile(slots, (int(op.num_lists), 1)),
        }  # fmt: skip

    def _split(self, index: Values) -> tuple[Values, Values]:
        """Landmarks chosen, as those that are there already and those missed."""
        hits = int(self.num_chosen - self.num_missed)
        return index[:, :hits], index[:, hits:]

    def _found(self, inputs: Arrays, index: Values) -> Arrays:
        """Keys and values of those landmarks in plain NumPy."""
        per_list = index.shape[1] * int(self.chunk)
        op = self.recover().over(num_tokens=max(per_list, 1))
        return op.reference(self._addressed(inputs, index))

    def reference(self, inputs: Arrays) -> Arrays:
        """NumPy."""
        q = inputs["q"].reshape(int(self.num_lists), int(self.group), -1)
        scores = q @ inputs["landmarks"].swapaxes(-1, -2)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        best = (p / p.sum(axis=-1, keepdims=True)).max(axis=1)
        index = self.select().reference({"x": best})["index"]
        rows = self._attention_inputs(inputs, [self._found(inputs, index)])
        return {"index": index} | dict(self.attend().reference(rows))

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs; chunks that the step before chose lie in their slots already."""
        index = self._selected(machine, inputs)
        there, missed = self._split(index)
        parts = [self._found(inputs, there)] if there.size else []
        if missed.size:
            parts.append(self.recover().program(machine, self._addressed(inputs, missed)))
        attended = self.attend().program(machine, self._attention_inputs(inputs, parts))
        return {"index": index} | dict(attended)

    def _selected(self, machine: Machine, inputs: Arrays) -> Values:
        """Landmarks chosen for every list, ascending."""
        lists, group, cols = int(self.num_lists), int(self.group), int(self.num_landmarks)
        q = machine.place(inputs["q"].reshape(lists, group, -1), self.dtype)
        marks = machine.place(inputs["landmarks"].swapaxes(-1, -2), self.dtype)
        scores, p = (machine.empty((lists, group, cols), self.dtype) for _ in range(2))
        self.scores().run(machine, q, marks, scores)
        flat = (SlowArray(x.values.reshape(-1, cols), x.dtype) for x in (scores, p))
        self.softmax().run(machine, next(flat), next(flat))
        best = SlowArray(p.values[:, :1], p.dtype)
        if group > 1:
            best = machine.empty((lists, 1, cols), self.dtype)
            self.largest().run(machine, p, best)
        index = machine.empty((lists, int(self.num_chosen)), INDEX)
        self.select().run(machine, SlowArray(best.values[:, 0], best.dtype), index)
        return index.values


@dataclass(frozen=True, kw_only=True)
class ShadowKvBuild(StagedOp):
    """What a prompt of `len_kv` tokens takes beside its attention, one layer of `batch` sequences.

    The factors come from a singular value decomposition of the keys, [N, D] with D = num_kv_heads
    head_dim, in fp32. With n = max(N, D), m = min(N, D) the R-SVD takes 6 n m^2 + 20 m^3 flops
    (Golub and Van Loan 2013, Matrix Computations, 4th edition, section 8.6.3) and at least reads
    the matrix and writes U. Then landmarks (chunk means), cosines of keys to them, the least of a
    chunk, the chunks of the smallest; values go to the host beside it all.

    >>> op = ShadowKvBuild(num_kv_heads=8, len_kv=2**17, head_dim=128)
    >>> op.svd_flops() == 6 * 2**17 * 1024**2 + 20 * 1024**3
    True
    """

    name: ClassVar[str] = "shadow_kv_build"
    cheaper: ClassVar[tuple[str, ...]] = ("chunk",)
    batch: Num = 1
    num_kv_heads: Num
    len_kv: Num
    head_dim: Num
    chunk: Num = 8
    num_outliers: Num = 48
    dtype: DType = BF16

    def check(self) -> None:
        """At least one whole chunk."""
        if any_true(self.len_kv < self.chunk):
            raise InputError(
                f"{self.name}: len_kv = {self.len_kv} must hold a chunk of {self.chunk}; "
                f"give a longer sequence or a smaller chunk"
            )

    @property
    def num_chunks(self) -> Num:
        """Whole chunks."""
        return self.len_kv // self.chunk

    def svd_flops(self) -> Num:
        """Of one sequence, U, S and V."""
        dim = self.num_kv_heads * self.head_dim
        long, short = maximum(self.len_kv, dim), minimum(self.len_kv, dim)
        return 6 * long * short**2 + 20 * short**3

    def stages(self) -> tuple[Stage, ...]:
        """Factors, landmarks, outliers, and beside them the values' way to the host."""
        lists, chunks = self.batch * self.num_kv_heads, self.num_chunks
        tokens = chunks * self.chunk
        keys = self.batch * self.len_kv * self.num_kv_heads * self.head_dim
        svd = CountedOp(
            moved_bytes=2 * keys * FP32.bytes_per_element,
            tensor_flops=self.batch * self.svd_flops(), dtype=FP32,
        )  # fmt: skip
        means = BlockPool(
            batch=lists, len_seq=tokens, dim=self.head_dim, block=self.chunk, dtype=self.dtype
        )
        cosines = BatchedMatmul(
            batch=lists * chunks, m=self.chunk, n=1, k=self.head_dim, dtype=self.dtype
        )
        least = BlockPool(
            batch=lists, len_seq=tokens, dim=1, block=self.chunk, dtype=self.dtype, kind="max"
        )
        outliers = TopK(
            rows=lists, cols=chunks, k=minimum(self.num_outliers, chunks), dtype=self.dtype
        )
        copy = HostCopy(num_bytes=keys * self.dtype.bytes_per_element, to_host=True)
        return (
            Stage("svd", svd), Stage("landmarks", means), Stage("cosines", cosines),
            Stage("least", least), Stage("outliers", outliers), Stage("offload", copy, beside=True),
        )  # fmt: skip

    def compulsory_bytes(self) -> Num:
        """K and V read once, landmarks written once."""
        rows = 2 * self.len_kv + self.num_chunks
        elements = self.batch * self.num_kv_heads * rows * self.head_dim
        return elements * self.dtype.bytes_per_element

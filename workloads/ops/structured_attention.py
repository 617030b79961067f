"""Attention with a structure fixed beforehand or routed by content, made of exact kernels.

    routing_transformer  Roy et al. 2020 (arXiv 2003.05997): k centroids a head; each takes its
                         w = n / k nearest queries and keys, attention inside: n k d + n w d,
                         least at k = sqrt(n)
    combiner             Ren et al. 2021 (arXiv 2107.05768, fixed pattern): the own block of b keys,
                         and one pooled key and value a block for the rest: n b + n (n / b)
    fit                  Chen and Li 2023 (arXiv 2305.12689): groups of g tokens attend inside, m
                         latents a group read them, attend to each other globally and write back:
                         n g + (n m / g)^2 + 2 n m, of order n^(4/3) at g = n^(1/3)
    seqboat_sma          Ren et al. 2023 (arXiv 2306.11197): a share `active_frac` of the tokens,
                         chosen by a score, attends in chunks of `window`
    xl3m                 Wang et al. 2024 (arXiv 2405.17755): segments with the question behind
                         each are read apart, the best are read again together

Every stage is the program of an exact kernel; what a scheme does between them (projections, the
state-space layer before SeqBoat's gate, the head whose entropies XL3M compares) is left out, as are
the masks of routed and pooled keys, which a causal model needs: tiles are computed whole.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, ceil_div, floor, maximum, minimum, sqrt
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.block_pool import BlockPool
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.selected_attention import SelectedAttention
from workloads.ops.selection import Step
from workloads.ops.shared_prefix import CombineParts
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.top_k import TopK


@dataclass(frozen=True, kw_only=True)
class StructuredAttention(ProvedStagedOp):
    """What these share: one sequence length, heads with K and V of their own, stages in turn."""

    batch: Num = 1
    num_heads: Num
    len_seq: Num
    head_dim: Num
    dtype: DType = BF16

    @abstractmethod
    def kernels(self) -> dict[str, ProvedOp]:
        """The stages by name, in order."""

    @abstractmethod
    def run(self, step: Step, inputs: Arrays) -> Arrays:
        """All stages in turn, each by its program or its reference."""

    def stages(self) -> tuple[Stage, ...]:
        """The kernels, once each."""
        return tuple(Stage(name, op) for name, op in self.kernels().items())

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O once."""
        rows = self.batch * self.num_heads * self.len_seq
        return 4 * rows * self.head_dim * self.dtype.bytes_per_element

    def io_lower_bound_bytes(self, fast_bytes: Num) -> Num:
        """None is known beyond reading what is selected: the least any of the stages moves."""
        return 0.0 * self.compulsory_bytes()

    def reference(self, inputs: Arrays) -> Arrays:
        """The stages' naive forms in turn."""
        return self.run(lambda op, given: op.reference(given), inputs)

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        return self.run(lambda op, given: op.program(machine, given), inputs)

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random q, k and v [batch, num_heads, len_seq, head_dim]."""
        shape = tuple(int(n) for n in (self.batch, self.num_heads, self.len_seq, self.head_dim))
        return {name: rng.standard_normal(shape) for name in ("q", "k", "v")}

    def attention(self, batch: Num, len_q: Num, len_kv: Num, *, causal: bool) -> FlashAttention2:
        """The kernel for `batch` independent pieces."""
        return FlashAttention2(
            batch=batch, num_heads=self.num_heads, len_q=len_q, len_kv=len_kv,
            head_dim=self.head_dim, causal=causal, dtype=self.dtype,
        )  # fmt: skip

    def must_divide(self, name: str, part: Num, whole: Num) -> None:
        """Refuse pieces that do not make up the sequence."""
        if any_true(whole % part != 0):
            raise InputError(
                f"{self.name}: {name} = {part} must divide {whole}; pad the sequence to a multiple"
            )


@dataclass(frozen=True, kw_only=True)
class RoutingAttention(StructuredAttention):
    """Every centroid's nearest queries over its nearest keys; `num_clusters` left out: sqrt(n).

    >>> op = RoutingAttention(num_heads=1, len_seq=4096, head_dim=64)
    >>> op.clusters, op.window, sum(op.min_flops().values()) == 4 * 4096 * 64 * 64 * 2
    (64, 64, True)
    """

    name: ClassVar[str] = "routing_attention"
    num_clusters: Num | None = None

    def check(self) -> None:
        """No more clusters than tokens."""
        if any_true(self.clusters > self.len_seq):
            raise InputError(
                f"{self.name}: num_clusters = {self.num_clusters} is more than "
                f"len_seq = {self.len_seq}"
            )

    @property
    def clusters(self) -> Num:
        """`num_clusters`, else the nearest whole number to sqrt(len_seq)."""
        if self.num_clusters is not None:
            return self.num_clusters
        return maximum(floor(sqrt(self.len_seq) + 0.5), 1)

    @property
    def window(self) -> Num:
        """Queries and keys of a cluster: clusters of equal size."""
        return ceil_div(self.len_seq, self.clusters)

    def kernels(self) -> dict[str, ProvedOp]:
        """Scores of queries and of keys by every centroid, their best, attention inside."""
        heads, k, w = self.batch * self.num_heads, self.clusters, self.window
        scores = BatchedMatmul(
            batch=heads, m=k, n=self.len_seq, k=self.head_dim, dtype=self.dtype, out_dtype=FP32
        )
        top = TopK(rows=heads * k, cols=self.len_seq, k=w)
        attend = SelectedAttention(
            batch=self.batch, num_heads=self.num_heads, len_q=k * w, len_kv=self.len_seq,
            head_dim=self.head_dim, len_selected=w, block_q=w, dtype=self.dtype,
        )  # fmt: skip
        return {"score_queries": scores, "route_queries": top, "score_keys": scores,
                "route_keys": top, "attend": attend}  # fmt: skip

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Also the centroids c[num_heads, num_clusters, head_dim]."""
        shape = tuple(int(n) for n in (self.num_heads, self.clusters, self.head_dim))
        return {**super().inputs(rng), "c": rng.standard_normal(shape)}

    def run(self, step: Step, inputs: Arrays) -> Arrays:
        """O of every cluster's queries, cluster after cluster."""
        ops, batch = self.kernels(), int(self.batch)
        centroids = np.concatenate([inputs["c"]] * batch)
        routes = {}
        for name, what in (("queries", "q"), ("keys", "k")):
            tokens = inputs[what].reshape(-1, int(self.len_seq), int(self.head_dim))
            scores = step(ops[f"score_{name}"], {"a": centroids, "b": tokens.swapaxes(1, 2)})["c"]
            flat = scores.reshape(-1, int(self.len_seq))
            routes[name] = step(ops[f"route_{name}"], {"x": flat})["index"].astype(np.int64)
        order = routes["queries"].reshape(batch, int(self.num_heads), -1)
        q = np.take_along_axis(inputs["q"], order[..., None], axis=2)
        index = routes["keys"].astype(np.float64)
        given = {"q": q, "k": inputs["k"], "v": inputs["v"], "index": index}
        return step(ops["attend"], given)


@dataclass(frozen=True, kw_only=True)
class CombinerAttention(StructuredAttention):
    """The own block exactly, other blocks by their pooled keys and values.

    >>> op = CombinerAttention(num_heads=1, len_seq=4096, head_dim=64, block=64)
    >>> sum(op.min_flops().values()) < 4 * 4096 * (64 + 64) * 64
    True
    """

    name: ClassVar[str] = "combiner_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("block",)
    block: Num = 64

    def check(self) -> None:
        """Whole blocks."""
        self.must_divide("block", self.block, self.len_seq)

    def kernels(self) -> dict[str, ProvedOp]:
        """Pooling of K and of V, the two attentions, their combination."""
        blocks = self.len_seq // self.block
        pool = BlockPool(
            batch=self.batch * self.num_heads, len_seq=self.len_seq, dim=self.head_dim,
            block=self.block, kind="max", dtype=self.dtype,
        )  # fmt: skip
        rows = self.batch * self.num_heads * self.len_seq
        return {
            "pool_keys": pool,
            "pool_values": pool,
            "local": self.attention(self.batch * blocks, self.block, self.block, causal=True),
            "pooled": self.attention(self.batch, self.len_seq, blocks, causal=False),
            "combine": CombineParts(rows=rows, dim=self.head_dim, dtype=self.dtype),
        }

    def run(self, step: Step, inputs: Arrays) -> Arrays:
        """The two parts put together by their logsumexps."""
        ops, shape = self.kernels(), inputs["q"].shape
        blocks = int(self.len_seq // self.block)
        pooled = {
            what: step(ops[f"pool_{name}"], {"x": inputs[what].reshape(-1, *shape[2:])})["y"]
            .reshape(*shape[:2], blocks, shape[3])
            for name, what in (("keys", "k"), ("values", "v"))
        }  # fmt: skip
        split = {name: _blocked(values, blocks) for name, values in inputs.items()}
        local = step(ops["local"], split)
        far = step(ops["pooled"], {"q": inputs["q"], **pooled})
        parts = [_unblocked(local["o"], shape), far["o"]]
        sums = [_unblocked(local["lse"], (*shape[:3], 1)), far["lse"]]
        given = {
            "parts": np.stack([p.reshape(-1, shape[3]) for p in parts]),
            "lse": np.stack([s.reshape(-1, 1) for s in sums]),
        }
        return step(ops["combine"], given)


def _blocked(values: Values, blocks: int) -> Values:
    """[batch, heads, n, d] as [batch blocks, heads, n / blocks, d]."""
    batch, heads, n, d = values.shape
    split = values.reshape(batch, heads, blocks, n // blocks, d).swapaxes(1, 2)
    return split.reshape(batch * blocks, heads, n // blocks, d)


def _unblocked(values: Values, shape: tuple[int, ...]) -> Values:
    """The inverse of `_blocked`."""
    batch, heads, n, d = shape
    blocks = values.shape[0] // batch
    return values.reshape(batch, blocks, heads, n // blocks, d).swapaxes(1, 2).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class FitAttention(StructuredAttention):
    """Local attention in groups of `group` tokens, global attention of `num_latents` a group.

    >>> op = FitAttention(num_heads=1, len_seq=4096, head_dim=64, group=16)
    >>> pairs = 4096 * 16 + 256**2 + 2 * 4096
    >>> sum(op.min_flops().values()) == 4 * 64 * pairs
    True
    """

    name: ClassVar[str] = "fit_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("group",)
    group: Num = 16
    num_latents: Num = 1

    def check(self) -> None:
        """Whole groups."""
        self.must_divide("group", self.group, self.len_seq)

    def kernels(self) -> dict[str, ProvedOp]:
        """Inside groups, latents reading, latents among themselves, latents writing."""
        groups, m, g = self.len_seq // self.group, self.num_latents, self.group
        pieces = self.batch * groups
        return {
            "local": self.attention(pieces, g, g, causal=False),
            "read": self.attention(pieces, m, g, causal=False),
            "latent": self.attention(self.batch, groups * m, groups * m, causal=False),
            "write": self.attention(pieces, g, m, causal=False),
        }

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v of every stage: the projections between them are ops of their own."""
        return {
            f"{stage}_{name}": values
            for stage, op in self.kernels().items()
            for name, values in op.inputs(rng).items()
        }

    def run(self, step: Step, inputs: Arrays) -> Arrays:
        """O of every stage."""
        return {
            f"{stage}_o": step(op, {n: inputs[f"{stage}_{n}"] for n in ("q", "k", "v")})["o"]
            for stage, op in self.kernels().items()
        }


@dataclass(frozen=True, kw_only=True)
class ActivatedAttention(StructuredAttention):
    """The `active_frac` best-scored tokens attend in chunks of `window` (SeqBoat, r = 0.3).

    >>> op = ActivatedAttention(num_heads=1, len_seq=4096, head_dim=64, window=128, active_frac=0.5)
    >>> op.num_active
    2048
    """

    name: ClassVar[str] = "activated_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("window",)
    window: Num = 128
    active_frac: Num = 0.3

    @property
    def width(self) -> Num:
        """Tokens of a chunk: the window, or a shorter sequence."""
        return minimum(self.window, self.len_seq)

    @property
    def chunks(self) -> Num:
        """Whole chunks that hold the active tokens, as far as the sequence reaches."""
        wanted = maximum(ceil_div(floor(self.active_frac * self.len_seq), self.width), 1)
        return minimum(wanted, self.len_seq // self.width)

    @property
    def num_active(self) -> Num:
        """Active tokens, in whole chunks."""
        return self.chunks * self.width

    def compulsory_bytes(self) -> Num:
        """Hidden states once; Q, K, V and O of the active tokens once."""
        rows = self.len_seq + 4 * self.num_active
        e = self.dtype.bytes_per_element
        return self.batch * self.num_heads * rows * self.head_dim * e

    def kernels(self) -> dict[str, ProvedOp]:
        """The gate's score of every token, the best of them, attention in their chunks."""
        score = BatchedMatmul(
            batch=self.batch, m=self.len_seq, n=1, k=self.num_heads * self.head_dim,
            dtype=self.dtype, out_dtype=FP32,
        )  # fmt: skip
        return {
            "score": score,
            "select": TopK(rows=self.batch, cols=self.len_seq, k=self.num_active),
            "attend": self.attention(self.batch * self.chunks, self.width, self.width, causal=True),
        }

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Also hidden states x and the gate's weights."""
        return {**super().inputs(rng), **self.kernels()["score"].inputs(rng)}

    def run(self, step: Step, inputs: Arrays) -> Arrays:
        """O of the active tokens, chunk after chunk."""
        ops, chunks = self.kernels(), int(self.chunks)
        scores = step(ops["score"], {"a": inputs["a"], "b": inputs["b"]})["c"]
        found = step(ops["select"], {"x": scores[..., 0]})["index"].astype(np.int64)
        active = {n: np.take_along_axis(inputs[n], found[:, None, :, None], axis=2) for n in "qkv"}
        return step(ops["attend"], {n: _blocked(v, chunks) for n, v in active.items()})


@dataclass(frozen=True, kw_only=True)
class SegmentedPrefill(StructuredAttention):
    """Segments read apart with `len_question` tokens behind each, `num_kept` of them read again.

    >>> op = SegmentedPrefill(num_heads=1, len_seq=2**20, head_dim=128)
    >>> op.num_segments, op.len_final
    (512, 8256)
    """

    name: ClassVar[str] = "segmented_prefill"
    cheaper: ClassVar[tuple[str, ...]] = ("segment",)
    segment: Num = 2048
    len_question: Num = 64
    num_kept: Num = 4

    def check(self) -> None:
        """Whole segments."""
        self.must_divide("segment", self.length, self.len_seq)

    @property
    def length(self) -> Num:
        """Tokens of a segment: a shorter sequence is one."""
        return minimum(self.segment, self.len_seq)

    @property
    def num_segments(self) -> Num:
        """Segments of the context."""
        return self.len_seq // self.length

    @property
    def kept(self) -> Num:
        """Segments read again: at most those there are."""
        return minimum(self.num_kept, self.num_segments)

    @property
    def len_final(self) -> Num:
        """Tokens of the second reading."""
        return self.kept * self.length + self.len_question

    def kernels(self) -> dict[str, ProvedOp]:
        """The segments, the choice of the best, the second reading."""
        once = self.length + self.len_question
        return {
            "segments": self.attention(self.batch * self.num_segments, once, once, causal=True),
            "select": TopK(rows=self.batch, cols=self.num_segments, k=self.kept),
            "again": self.attention(self.batch, self.len_final, self.len_final, causal=True),
        }

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v of both readings, and the segments' scores."""
        return {
            f"{stage}_{name}": values
            for stage, op in self.kernels().items()
            for name, values in op.inputs(rng).items()
        }

    def run(self, step: Step, inputs: Arrays) -> Arrays:
        """O of both readings and the segments chosen."""
        found = {}
        for stage, op in self.kernels().items():
            given = {n.partition("_")[2]: v for n, v in inputs.items() if n.startswith(f"{stage}_")}
            done = step(op, given)
            found[stage] = done["index" if stage == "select" else "o"]
        return found

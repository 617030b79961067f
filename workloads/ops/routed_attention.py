"""Routing Transformer: attention inside clusters that online k-means makes of queries and keys.

Roy et al. 2020 (arXiv 2003.05997, section 4.1, algorithm 1). Every head has k centroids of unit
length. Each centroid takes the w = n / k tokens nearest to it (clusters of one size, so a token may
be in several or in none), and attention stays inside clusters:

    scores   2 n k d flops, once if queries and keys are the same (`shared_qk`), else twice
    attend   4 k w^2 d = 4 n^2 d / k flops, a causal mask leaves about half

Added up, c (n k d + n^2 d / k), least at k = sqrt(n): O(n^1.5 d). That is the default of
`num_clusters`. Members are gathered in the order of the sequence, so that the causal mask of a
cluster is the usual triangle; it needs shared queries and keys, as the paper's language models have
them. Outputs go back to their tokens: of a token in several clusters the last one's stays, of one
in none zero. Ignored: normalising q and k, the running means of the centroids, the token itself as
a key (which shared queries and keys leave out), the heads that the paper keeps local, 4 bytes of an
index for every row gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, floor, maximum, sqrt
from workloads.op import Arrays, Stage
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.staged import Step
from workloads.ops.structured import StructuredAttention, attended, moved
from workloads.ops.top_k import TopK


@dataclass(frozen=True, kw_only=True)
class RoutedAttention(StructuredAttention):
    """`num_clusters` clusters of n / k tokens (rounded down); the nearest to sqrt(n) if left out.

    >>> op = RoutedAttention(num_heads=1, len_seq=4096, head_dim=64, shared_qk=False, causal=False)
    >>> op.clusters, op.members, op.min_flops()[op.dtype] == 4 * 64 * (4096 * 64 + 4096**2 / 64)
    (64, 64, True)
    """

    name: ClassVar[str] = "routed_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_clusters",)
    num_clusters: Num | None = None
    shared_qk: bool = True
    causal: bool = True

    def check(self) -> None:
        """A cluster has a token; a triangle needs members that are queries and keys alike."""
        if any_true(self.clusters > self.len_seq):
            raise InputError(
                f"{self.name}: num_clusters = {self.num_clusters} is more than the "
                f"len_seq = {self.len_seq} tokens; give fewer"
            )
        if self.causal and not self.shared_qk:
            raise InputError(
                f"{self.name}: causal needs shared_qk=true, which gives queries and keys of a "
                f"cluster one order; or give causal=false"
            )

    @property
    def clusters(self) -> Num:
        """`num_clusters`, else the whole number nearest to sqrt(len_seq)."""
        if self.num_clusters is not None:
            return self.num_clusters
        return maximum(floor(sqrt(self.len_seq) + 0.5), 1)

    @property
    def members(self) -> Num:
        """Tokens of a cluster."""
        return self.len_seq // self.clusters

    @property
    def num_routed(self) -> int:
        """Arrays that are routed: one where queries and keys are the same."""
        return 1 if self.shared_qk else 2

    def compulsory_bytes(self) -> Num:
        """Centroids, each array of rows and O once."""
        rows = self.streams * (self.len_seq * (2 + self.num_routed) + self.clusters)
        return rows * self.head_dim * self.dtype.bytes_per_element

    def score(self) -> BatchedMatmul:
        """Every centroid against every token."""
        return BatchedMatmul(
            batch=self.streams, m=self.clusters, n=self.len_seq, k=self.head_dim, dtype=self.dtype
        )

    def top(self) -> TopK:
        """The members of every cluster."""
        return TopK(
            rows=self.streams * self.clusters, cols=self.len_seq, k=self.members, dtype=self.dtype
        )

    def gather(self) -> Elementwise:
        """Members side by side, or back."""
        return self.copy(self.streams * self.clusters * self.members)

    def zero(self) -> Elementwise:
        """O before any cluster writes to it."""
        elements = self.streams * self.len_seq * self.head_dim
        return Elementwise(
            num_elements=elements, num_inputs=0, vector_flops_per_element=0, dtype=self.dtype
        )

    def attend(self) -> FlashAttention2:
        """Clusters as sequences of their own."""
        count = self.streams * self.clusters
        return self.pieces(count, self.members, self.members, causal=self.causal)

    def stages(self) -> tuple[Stage, ...]:
        """Route, gather, attend, write back."""
        return (
            Stage("score", self.score(), self.num_routed),
            Stage("top", self.top(), self.num_routed),
            Stage("gather", self.gather(), 1 + self.num_routed),
            Stage("attend", self.attend()),
            Stage("zero", self.zero()),
            Stage("scatter", self.gather()),
        )

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, v, centroids[batch, num_heads, clusters, head_dim], and k where it differs from q."""
        found = dict(super().inputs(rng)) | {"centroids": self.random_rows(rng, self.clusters)}
        if self.shared_qk:
            del found["k"]
        return found

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Queries and keys to clusters, values with the keys, outputs with the queries."""
        rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in inputs.items()}
        routes, parts = {}, {}
        for name in ("q",) if self.shared_qk else ("q", "k"):
            routes[name] = self._routed(step, rows["centroids"], rows[name])
            parts[name] = self._gathered(step, rows[name], routes[name])
        if self.shared_qk:
            routes["k"], parts["k"] = routes["q"], parts["q"]
        parts["v"] = self._gathered(step, rows["v"], routes["k"])
        o, _ = attended(step, self.attend(), parts["q"], parts["k"], parts["v"])
        found = 0.0 * step(self.zero(), {})["y0"].reshape(rows["q"].shape)
        written = moved(step, self.gather(), o).reshape(*routes["q"].shape, -1)
        for stream, lists in enumerate(routes["q"]):
            for cluster, members in enumerate(lists):
                found[stream, members] = written[stream, cluster]
        return {"o": found.reshape(inputs["q"].shape)}

    def _routed(self, step: Step, centroids: Values, rows: Values) -> Values:
        """Members [streams, clusters, w] of every cluster."""
        scores = step(self.score(), {"a": centroids, "b": rows.swapaxes(-1, -2)})["c"]
        found = step(self.top(), {"x": scores.reshape(-1, scores.shape[-1])})["index"]
        return found.astype(np.int64).reshape(*scores.shape[:2], -1)

    def _gathered(self, step: Step, rows: Values, routes: Values) -> Values:
        """[streams clusters, w, head_dim]."""
        picked = rows[np.arange(len(rows))[:, None, None], routes]
        return moved(step, self.gather(), picked.reshape(-1, *picked.shape[2:]))

"""Causal linear attention behind a feature map: phi of queries and keys, then a recurrence.

    o_i = sum_{j <= i} (phi(q_i) . phi(k_j)) v_j / sum_{j <= i} phi(q_i) . phi(k_j)

phi is a map of `feature_map` with w features (Katharopoulos et al. 2020); Hedgehog (Zhang et al.
2024, arXiv 2402.04347, section 4.2) learns a product W for each head and for queries and keys, and
maps to softmax([W x, -W x]), w = 2 d. For N tokens of width d, a head:

    products   2 (2 N d^2)  where W is learned    + 4 N w d and the chunks' own (linear recurrence)

For Hedgehog 4 N d (2 d), what the paper says, beside the map's 4 N d^2. Distilling W is training
and no part of this. Ignored: the bias of W, the scale 1 / sqrt(d) (part of W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from workloads.machine import Machine, Values
from workloads.numeric import Num
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.feature_map import ELU, FEATURES, LEARNED, KernelFeatures
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.recurrent_attention import RecurrentAttention, recurred
from workloads.ops.staged import Step


@dataclass(frozen=True, kw_only=True)
class FeatureAttention(RecurrentAttention):
    """Q, K, V, O[batch, num_heads, len_seq, head_dim]; W[num_heads, head_dim, head_dim].

    With `update` it makes one step (len_seq = 1) from the state that decoding keeps.

    >>> op = FeatureAttention(num_heads=1, len_seq=1024, head_dim=64, feature="hedgehog")
    >>> list(op.recurrence().min_flops().values()) == [4 * 1024 * 64 * (2 * 64)]
    True
    """

    name: ClassVar[str] = "feature_attention"
    feature: str = ELU

    def check(self) -> None:
        """A known map; an update is one step."""
        super().check()
        self.features()

    def projection(self) -> BatchedMatmul:
        """W of every head on its queries, or its keys."""
        return BatchedMatmul(
            batch=self.num_heads, m=self.batch * self.len_seq, n=self.head_dim, k=self.head_dim,
            dtype=self.dtype,
        )  # fmt: skip

    def features(self) -> KernelFeatures:
        """phi of all queries, or keys."""
        return KernelFeatures(
            rows=self.rows, dim=self.head_dim, feature=self.feature, dtype=self.dtype
        )

    def recurrence(self) -> ProvedOp:
        """Linear attention over the features, or its step."""
        return self.recurrence_of(self.features().width, self.head_dim)

    def state_bytes(self) -> Num:
        """What decoding keeps of all heads, in fp32: 4 w (d + 1) each."""
        return self.step_of(self.features().width, self.head_dim).state_bytes()

    def stages(self) -> tuple[Stage, ...]:
        """W and phi of queries and of keys, then the recurrence."""
        learned = (Stage("project", self.projection(), 2),) if self.feature in LEARNED else ()
        return (*learned, Stage("features", self.features(), 2), Stage("recur", self.recurrence()))

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O once, the weights of both maps, the state of an update."""
        weights = 2 * self.num_heads * self.head_dim * self.head_dim * (self.feature in LEARNED)
        elements = 4 * self.rows * self.head_dim + weights
        return elements * self.dtype.bytes_per_element + 2 * self.update * self.state_bytes()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v; the weights of a learned map; the state of an update."""
        heads, d = int(self.num_heads), int(self.head_dim)
        shape = int(self.batch), heads, int(self.len_seq), d
        found = {name: rng.standard_normal(shape) for name in ("q", "k", "v")}
        if self.feature in LEARNED:
            found |= {n: rng.standard_normal((heads, d, d)) / d**0.5 for n in ("w_q", "w_k")}
        if self.update:
            given = self.recurrence().inputs(rng)
            found |= {name: given[name] for name in ("state", "total")}
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """All weights phi(q) . phi(k) written out under the causal mask, then normalised."""
        phi = {}
        for name in ("q", "k"):
            x = inputs[name]
            x = x @ inputs[f"w_{name}"] if self.feature in LEARNED else x
            flat = FEATURES[self.feature].naive(x.reshape(-1, x.shape[-1]))
            phi[name] = flat.reshape(*x.shape[:3], -1)
        weights = np.tril(phi["q"] @ phi["k"].swapaxes(2, 3))
        o, total = weights @ inputs["v"], weights.sum(-1, keepdims=True)
        if not self.update:
            return {"o": o / total}
        before = phi["q"] @ inputs["total"][..., None]
        return {
            "o": (o + phi["q"] @ inputs["state"]) / (total + before),
            "state": inputs["state"] + phi["k"].swapaxes(2, 3) @ inputs["v"],
            "total": inputs["total"] + phi["k"][:, :, 0],
        }

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Map queries, map keys, run the recurrence."""
        given = {name: self._mapped(step, inputs, name) for name in ("q", "k")}
        return recurred(step, self.recurrence(), given | {"v": inputs["v"]}, inputs)

    def _mapped(self, step: Step, inputs: Arrays, name: str) -> Values:
        x = inputs[name]
        if self.feature in LEARNED:
            heads = x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])
            found = step(self.projection(), {"a": heads, "b": inputs[f"w_{name}"]})["c"]
            x = found.reshape(x.shape[1], x.shape[0], *x.shape[2:]).swapaxes(0, 1)
        y = step(self.features(), {"x": x.reshape(-1, x.shape[-1])})["y"]
        return y.reshape(*x.shape[:3], -1)

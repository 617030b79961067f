"""What a module of multi-token prediction computes beside its layer, on one rank.

A module (DeepSeek-V3, arXiv 2412.19437, section 2.2) norms the hidden state and the embedding of
the token ahead, projects both together back to the hidden size, runs a layer of the model's last
kind (`layer`), and predicts with the shared head: one more final norm, one more product over the
vocabulary, one more loss. The shared embedding is looked up once more.
"""

from __future__ import annotations

from dataclasses import replace

from workloads.models.block import Rank, norm, product, unrolled
from workloads.workload import Node, Workload

MTP = "mtp"
"""The part of a step that its nodes belong to."""


def mtp_ends(rank: Rank, ends: Workload) -> Workload:
    """Norms and projection of one module, and again what `ends` has before and after the layers."""
    hidden = rank.cfg.hidden_dim
    steps = [
        norm(rank, "hidden_norm", part=MTP),
        norm(rank, "embedding_norm", part=MTP),
        product(rank, "projection", MTP, rank.rows, 2 * hidden, hidden),
    ]
    nodes = (*unrolled(MTP, steps, training=True), *ends)
    return Workload(tuple(map(_of_module, nodes)), f"{rank.cfg.name} {MTP}")


def _of_module(node: Node) -> Node:
    return replace(
        node, name=f"{MTP}.{node.name}", part=MTP, after=tuple(f"{MTP}.{n}" for n in node.after)
    )

"""The feed-forward half of a layer: one block for all tokens, or a mixture of experts.

A mixture: the router scores every expert for each of a rank's own tokens, the rows of chosen
experts are laid out (dispatch), travel (`simulator.expert_exchange`), pass their experts as grouped
products, travel back and are summed with their weights, beside what shared experts make of every
token (combine). Rows and experts hit are those of `experts`.

Ignored: the softmax and top-k of the router, its auxiliary loss, the sort of received rows by
expert, copies of padding.
"""

from __future__ import annotations

from hwmodels.dtypes import FP32
from workloads.models.architecture import Moe
from workloads.models.block import Rank, Step, activation, pointwise, product
from workloads.models.experts import expert_tokens, experts_hit, routed_rows
from workloads.models.parameters import mlp_projections
from workloads.models.projection import Projection
from workloads.numeric import Num, ceil_div
from workloads.ops.grouped_matmul import GroupedMatmul

EXPERTS = "experts"
"""Prefix of the nodes of the routed experts."""


def dense_steps(rank: Rank) -> list[Step]:
    """Widen, activate, narrow."""
    return _block(rank, "", "mlp", rank.cfg.mlp.ffn_dim)


def _block(
    rank: Rank, prefix: str, part: str, ffn_dim: int, after: tuple[str, ...] | None = None
) -> list[Step]:
    """A feed-forward block over all tokens of the rank."""
    dims = mlp_projections(rank.cfg, ffn_dim, rank.plan.tp)
    up, down = dims["up"], dims["down"]
    return [
        product(rank, f"{prefix}up", part, rank.tokens, up.k, up.n, after=after),
        activation(rank, f"{prefix}activation", part, rank.tokens * down.k),
        product(rank, f"{prefix}down", part, rank.tokens, down.k, down.n),
    ]


def moe_steps(rank: Rank) -> list[Step]:
    """Router, dispatch, experts, shared experts, weighted sum of what came back."""
    cfg, moe, dtype = rank.cfg, rank.cfg.moe, rank.dtype
    assert moe is not None
    chosen, elements, opening = moe.num_active, rank.rows * cfg.hidden_dim, ("mlp_norm",)
    hidden, choices = cfg.hidden_dim, moe.num_experts
    router = product(
        rank, "router", "moe", rank.rows, hidden, choices, out_dtype=FP32, after=opening
    )
    dispatch = Step(
        name="dispatch",
        part="moe",
        op=pointwise(elements, 1, chosen, (0, 0), dtype),
        gradients=(("backward", pointwise(elements, chosen, 1, (chosen - 1, 0), dtype)),),
        after=("mlp_norm", "router"),
    )
    has_shared = moe.shared_ffn_dim > 0
    shared = _block(rank, "shared.", "moe", moe.shared_ffn_dim, opening) if has_shared else []
    if moe.shared_gate:
        shared.insert(0, product(rank, "shared.gate", "moe", rank.rows, hidden, 1, after=opening))
    beside = ["shared.down"] * has_shared + ["shared.gate"] * moe.shared_gate
    combine = Step(
        name="combine",
        part="moe",
        op=pointwise(elements, chosen + has_shared, 1, (2 * chosen - 1 + has_shared, 0), dtype),
        gradients=(("backward", pointwise(elements, 1 + chosen, chosen, (3 * chosen, 0), dtype)),),
        after=("experts.down", "router", *beside),
    )
    return [router, dispatch, *_experts(rank, moe), *shared, combine]


def _experts(rank: Rank, moe: Moe) -> list[Step]:
    """The routed experts of a rank, rows spread evenly over those that are hit."""
    plan = rank.plan
    dims = mlp_projections(rank.cfg, moe.expert_ffn_dim, plan.expert_tp)
    busy = experts_hit(moe, plan.ep * expert_tokens(rank.tokens, plan), plan.ep)
    m = ceil_div(routed_rows(moe, rank.tokens, plan), busy)
    return [
        _grouped(rank, "up", busy, m, dims["up"]),
        activation(rank, f"{EXPERTS}.activation", "moe", busy * m * dims["down"].k),
        _grouped(rank, "down", busy, m, dims["down"]),
    ]


def _grouped(rank: Rank, name: str, groups: Num, m: Num, weight: Projection) -> Step:
    """A product of every busy expert with its own rows, and its two gradients."""
    k, n, dtype = weight.k, weight.n, rank.dtype
    dgrad = GroupedMatmul(batch=groups, m=m, n=k, k=n, dtype=dtype)
    wgrad = GroupedMatmul(batch=groups, m=k, n=n, k=m, dtype=dtype, out_dtype=FP32)
    return Step(
        name=f"{EXPERTS}.{name}",
        part="moe",
        op=GroupedMatmul(batch=groups, m=m, n=n, k=k, dtype=dtype),
        gradients=(("dgrad", dgrad),),
        weight_gradients=(("wgrad", wgrad),),
    )

"""Routed experts over the ranks of a plan: who holds which, how many rows reach a rank, who hits.

Ranks of one pipeline stage, innermost first (Megatron Core's `ParallelState`, expert order
tp-ep-dp): `etp` ranks share each expert's width, `ep` such groups hold E / ep experts each, and
what is left of dp * cp * tp are replicas of the same experts:

    replicas = dp cp tp / (etp ep)        whole: experts' gradients are reduced over these alone

Each rank routes its own t / tp tokens of a micro-batch (sequence parallelism). Behind the exchange
the ranks of a group of etp have the same rows, those of etp sequence shards:

    rows = ceil(t etp / tp) k load        load = capacity factor where tokens are dropped and the
                                          rest padded, else the imbalance of the loaded rank

With uniform routing an expert is missed by T tokens with probability (1 - k / E)^T, so that

    experts hit = E / ep (1 - (1 - k / E)^T)

of a rank's experts get a row from the T tokens of its expert-parallel group, and only their
weights are read.
"""

from __future__ import annotations

import numpy as np

from hwmodels.errors import InputError
from workloads.models.architecture import Moe, TransformerConfig
from workloads.numeric import Num, any_true, ceil_div, maximum, minimum, where
from workloads.placement import misplaced_experts
from workloads.plan import Plan

EDGE = 1e-9
"""What rounding may add to a whole number of experts."""


def expert_replicas(plan: Plan) -> Num:
    """Ranks that hold the same experts of a stage; 1 where ep takes more than there are.

    >>> expert_replicas(Plan(dp=16, tp=2, ep=32, etp=1)), expert_replicas(Plan(dp=16, tp=2, ep=8))
    (1.0, 2.0)
    """
    ranks = plan.dp * plan.cp * plan.tp
    return maximum(ranks / (plan.expert_tp * plan.ep), 1)


def load_of(moe: Moe) -> float:
    """Rows that the loaded rank computes over the mean rank's rows with no token dropped."""
    return moe.capacity_factor or moe.imbalance


def expert_tokens(num_tokens: Num, plan: Plan) -> Num:
    """Of a micro-batch's `num_tokens`, those that a group of etp ranks routes together."""
    return ceil_div(num_tokens * plan.expert_tp, plan.tp)


def routed_rows(moe: Moe, num_tokens: Num, plan: Plan) -> Num:
    """Rows that a rank's experts compute, of `num_tokens` of a micro-batch for each tp group.

    >>> moe = Moe(num_experts=8, num_active=2, expert_ffn_dim=64, layers=(0,), imbalance=1.5)
    >>> routed_rows(moe, 1024, Plan(tp=2)), routed_rows(moe, 1024, Plan(tp=2, etp=1))
    (3072, 1536)
    """
    return _at_least(expert_tokens(num_tokens, plan) * moe.num_active * load_of(moe))


def experts_hit(moe: Moe, num_tokens: Num, ep: Num = 1) -> Num:
    """Expected experts of one of `ep` ranks that a group's `num_tokens` tokens choose, rounded up.

    >>> moe = Moe(num_experts=256, num_active=8, expert_ffn_dim=64, layers=(0,))
    >>> experts_hit(moe, 1), experts_hit(moe, 32), experts_hit(moe, 10**4, ep=8)
    (8, 164, 32)
    """
    missed = (1 - moe.num_active / moe.num_experts) ** num_tokens
    held = ceil_div(moe.num_experts, ep)
    return maximum(minimum(_at_least(held * (1 - missed)), held), 1)


def _at_least(number: Num) -> Num:
    """The number rounded up to a whole one."""
    if isinstance(number, np.ndarray):
        return np.ceil(number - EDGE)
    return int(-(-(number - EDGE) // 1))


def check_experts(cfg: TransformerConfig, plan: Plan) -> None:
    """Refuse plans whose degrees do not divide the experts or the ranks they lie across."""
    moe = cfg.moe
    if moe is None:
        if any_true(np.greater(plan.ep, 1)):
            raise InputError(f"{cfg.name} has no experts; give ep = 1")
        return
    ranks = plan.dp * plan.cp * plan.tp
    spread = plan.expert_tp * plan.ep
    for number, by, rule in (
        (moe.num_experts, plan.ep, f"ep must divide the {moe.num_experts} experts of {cfg.name}"),
        (plan.tp, plan.expert_tp, "etp must divide tp (0: the same)"),
        (moe.expert_ffn_dim, plan.expert_tp,
         f"etp must divide the experts' inner width {moe.expert_ffn_dim}"),
        (ranks, spread, "etp * ep must divide dp * cp * tp, the ranks of a pipeline stage"),
    ):  # fmt: skip
        bad = np.not_equal(np.mod(number, by), 0)
        if any_true(bad):
            raise InputError(f"{rule}; {_shown(number, by, bad)}")
    for _, why in misplaced_experts(plan):
        raise InputError(why)


def _shown(number: Num, by: Num, bad: object) -> str:
    """The first pair that does not divide."""
    wrong = np.flatnonzero(np.atleast_1d(np.asarray(bad)))[0]
    one, other = (
        np.broadcast_to(v, np.shape(np.atleast_1d(np.asarray(bad)))).reshape(-1)[wrong]
        for v in (number, by)
    )
    return f"{other:g} does not divide {one:g}"


def distinct_copies(moe: Moe, places: Num) -> Num:
    """Places other than its own, of `places` that share the experts evenly, a token is sent to.

    Once to each: (n - 1) (1 - (1 - 1/o)^k) / (n / o), where of the n places o can be open to the
    token: all, or those of the groups a group-limited router opens (DeepSeek-V3, arXiv 2412.19437,
    section 2.1.2). Choices are taken as independent.

    >>> moe = Moe(num_experts=256, num_active=8, expert_ffn_dim=64, layers=(0,))
    >>> round(distinct_copies(moe, 8), 3)
    4.595
    """
    each = maximum(places / moe.num_groups, 1)
    reached = minimum(places, moe.num_open_groups * each)
    distinct = reached * (1 - (1 - 1 / reached) ** moe.num_active)
    return where(places > 1, distinct * (places - 1) / places, 0.0)

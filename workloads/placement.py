"""Where the groups of a plan lie: strides of its axes, of the replicas, and of the experts' groups.

Data-parallel replicas are the dp cp ranks that hold the same weights. Experts lie on the R = dp cp
tp ranks of a stage, etp innermost, then ep, then the replicas of one expert; ranks of a stage are
counted in the order of the axes without pp. Where pp lies inside dp (or cp), the stage's ranks come
in blocks of A = the degrees inside pp, one block every A pp places, and a group that has neighbours
s apart on the stage

    s n <= A     s apart, in a block                        s >= A     s pp apart
    otherwise    A / s of them s apart, the next A pp on

What is laid out: groups of etp ranks, and of etp ep, that divide a block or are whole blocks.
Megatron Core has less: where pp is not last, it asks for as many replicas of experts as of the
dense weights (`initialize_model_parallel`), etp ep = tp cp in the order tp-cp-pp-dp.

    Implemented in: `axis_strides`, `replica_spacing`, `expert_spacing`, `misplaced_experts`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from workloads.axis_order import Spacing, Strides, cut, numbers_of, of_two_axes, strides_of
from workloads.numeric import Num, where
from workloads.plan import Plan

ACROSS: Final = (
    "experts split over tp need its ranks side by side: give an order that begins with tp, or etp=1"
)
UNEVEN: Final = (
    "where pp lies inside other axes, groups of etp and of etp x ep ranks must divide the ranks "
    "inside pp, or be whole blocks of them: change ep, or give an order that ends with pp"
)


def axis_strides(plan: Plan) -> Strides:
    """Places between neighbours of every axis.

    >>> from workloads.axis_order import AxisOrder
    >>> axis_strides(Plan(tp=8, dp=4, pp=2, order=AxisOrder.TP_CP_PP_DP))
    Strides(tp=1, cp=8, dp=16, pp=8)
    """
    return strides_of(plan.order, tp=plan.tp, cp=plan.cp, dp=plan.dp, pp=plan.pp)


def replica_spacing(plan: Plan) -> Spacing:
    """Of the dp * cp ranks that hold the same dense weights.

    >>> from workloads.axis_order import AxisOrder
    >>> replica_spacing(Plan(tp=2, cp=2, pp=4, dp=8))
    2
    >>> replica_spacing(Plan(tp=2, cp=2, pp=4, dp=8, order=AxisOrder.TP_CP_PP_DP))
    Lattice(near=2, inner=2, far=16)
    """
    at = axis_strides(plan)
    return of_two_axes((plan.cp, at.cp), (plan.dp, at.dp))


def expert_spacing(plan: Plan, spaced: Num, num_ranks: Num) -> Spacing:
    """Of a group of ranks that lie `spaced` apart on a stage.

    >>> from workloads.axis_order import AxisOrder
    >>> plan = Plan(tp=2, dp=8, pp=4, ep=4, order=AxisOrder.TP_PP_CP_DP)
    >>> expert_spacing(plan, 2, 4), expert_spacing(plan, 1, 4)
    (8, Lattice(near=1, inner=2, far=8))
    """
    return cut(spaced, num_ranks, inside=axis_strides(plan).pp, times=plan.pp)


def layer_places(plan: Plan) -> list[Num]:
    """Numbers that are the same for plans of the same degrees whose groups in a layer lie alike.

    Places between neighbours mean nothing of a group of one.
    """
    at, etp = axis_strides(plan), plan.expert_tp
    groups: tuple[tuple[Num, Spacing], ...] = (
        (plan.tp, at.tp),
        (plan.cp, at.cp),
        (etp, expert_spacing(plan, 1, etp)),
        (plan.ep, expert_spacing(plan, etp, plan.ep)),
    )
    return [
        where(np.greater(n, 1), number, 1) for n, spaced in groups for number in numbers_of(spaced)
    ]


def misplaced_experts(plan: Plan) -> list[tuple[NDArray[np.bool_], str]]:
    """Which plans' experts cannot be laid out in their order, each with the reason in a line."""
    if not np.any(plan.order):
        return []
    at = axis_strides(plan)
    across = np.greater(plan.expert_tp, 1) & np.greater(at.tp, 1)
    found = [(np.asarray(across), ACROSS)]
    inside = where(np.equal(plan.pp, 1), plan.dp * plan.cp * plan.tp, at.pp)
    for span in (plan.expert_tp, plan.expert_tp * plan.ep):
        over = np.not_equal(np.mod(inside, span), 0) & np.not_equal(np.mod(span, inside), 0)
        found.append((np.asarray(over), UNEVEN))
    return [(bad, why) for bad, why in found if bad.any()]

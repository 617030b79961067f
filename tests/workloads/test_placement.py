"""Strides and lattices against ranks numbered one by one, in every order of the axes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import InputError
from workloads.axis_order import (
    ORDERS,
    AxisOrder,
    Lattice,
    Spacing,
    apart_of,
    order_named,
    span_of,
    strides_of,
)
from workloads.models.config import load_hf_config
from workloads.models.experts import check_experts, expert_replicas
from workloads.placement import (
    axis_strides,
    expert_spacing,
    layer_places,
    misplaced_experts,
    replica_spacing,
)
from workloads.plan import Plan

AXES = ("tp", "cp", "dp", "pp")
MIXTRAL = load_hf_config("examples/mixtral-8x7b.json")
degrees = st.fixed_dictionaries({axis: st.sampled_from([1, 2, 3, 4]) for axis in AXES})
orders = st.sampled_from(AxisOrder)


def numbered(plan: Plan) -> list[dict[str, int]]:
    """Every rank's place on every axis, in the order of the ranks."""
    axes = AxisOrder(int(plan.order)).axes
    sizes = [range(int(getattr(plan, axis))) for axis in reversed(axes)]
    return [dict(zip(reversed(axes), at, strict=True)) for at in itertools.product(*sizes)]


def groups_over(plan: Plan, *axes: str) -> list[list[int]]:
    """Ranks that differ in these axes alone."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, at in enumerate(numbered(plan)):
        found.setdefault(tuple(at[a] for a in AXES if a not in axes), []).append(rank)
    return list(found.values())


def laid_out(spaced: Spacing, num_ranks: int) -> list[int]:
    """Places of a group that begins at 0."""
    if not isinstance(spaced, Lattice):
        return [i * int(spaced) for i in range(num_ranks)]
    near, inner, far = (int(x) for x in (spaced.near, spaced.inner, spaced.far))
    return [(i // inner) * far + (i % inner) * near for i in range(num_ranks)]


def agree(groups: list[list[int]], spaced: Spacing) -> None:
    for group in groups:
        assert [rank - group[0] for rank in group] == laid_out(spaced, len(group))


@given(degrees=degrees, order=orders)
def test_groups_lie_where_ranks_are_numbered(degrees: dict[str, int], order: AxisOrder) -> None:
    plan = Plan(**degrees, order=order)
    for axis, stride in axis_strides(plan)._asdict().items():
        agree(groups_over(plan, axis), stride)
    agree(groups_over(plan, "dp", "cp"), replica_spacing(plan))


@given(degrees=degrees, order=orders, etp=st.sampled_from([0, 1]), ep=st.integers(1, 16))
def test_experts_lie_on_the_ranks_of_their_stage(
    degrees: dict[str, int], order: AxisOrder, etp: int, ep: int
) -> None:
    plan = Plan(**degrees, order=order, ep=ep, etp=etp)
    span = int(plan.expert_tp) * ep
    ranks = degrees["tp"] * degrees["cp"] * degrees["dp"]
    if ranks % span or misplaced_experts(plan):
        return
    replicas, width = int(expert_replicas(plan)), int(plan.expert_tp)
    for stage in groups_over(plan, "tp", "cp", "dp"):
        at = np.array(stage).reshape(replicas, ep, width)
        agree(at.reshape(-1, width).tolist(), expert_spacing(plan, 1, width))
        agree(at.transpose(0, 2, 1).reshape(-1, ep).tolist(), expert_spacing(plan, width, ep))
        agree(
            at.transpose(1, 2, 0).reshape(-1, replicas).tolist(),
            expert_spacing(plan, span, replicas),
        )
        if width > 1 and width == degrees["tp"]:  # experts are split over the tensor group
            assert at[0, 0].tolist() in groups_over(plan, "tp")


@given(degrees=degrees, order=orders, other=orders)
def test_axes_of_one_rank_lie_anywhere(
    degrees: dict[str, int], order: AxisOrder, other: AxisOrder
) -> None:
    """Orders that agree on the axes with more than one rank place every group alike."""
    several = [[a for a in o.axes if degrees[a] > 1] for o in (order, other)]
    one, two = (Plan(**degrees, order=o, ep=2, etp=1) for o in (order, other))
    if several[0] != several[1]:
        return
    strides = [axis_strides(p)._asdict() for p in (one, two)]
    assert all(strides[0][a] == strides[1][a] for a in several[0])
    if degrees["dp"] * degrees["cp"] > 1:
        assert replica_spacing(one) == replica_spacing(two)
    assert layer_places(one) == layer_places(two)


def test_arrays_are_plans_one_by_one() -> None:
    rng = np.random.default_rng(3)
    columns = {axis: rng.choice([1.0, 2.0, 4.0], 300) for axis in AXES}
    columns["order"] = rng.integers(0, len(AxisOrder), 300).astype(float)
    many = Plan(**columns)
    lattice = replica_spacing(many)
    assert isinstance(lattice, Lattice)
    for i in range(300):
        one = many.at(i)
        assert tuple(s[i] for s in np.broadcast_arrays(*axis_strides(many))) == axis_strides(one)
        own, n = replica_spacing(one), int(one.dp * one.cp)
        here = Lattice(near=lattice.near[i], inner=lattice.inner[i], far=lattice.far[i])
        assert laid_out(here, n) == laid_out(own, n)
        assert np.asarray(span_of(many.dp * many.cp, lattice))[i] == span_of(n, own)
        assert np.asarray(apart_of(many.dp * many.cp, lattice))[i] == apart_of(n, own)


def test_strides_by_hand() -> None:
    sizes = {"tp": 8, "cp": 2, "dp": 4, "pp": 16}
    assert strides_of(AxisOrder.TP_CP_DP_PP, **sizes) == (1, 8, 16, 64)
    assert strides_of(AxisOrder.TP_CP_PP_DP, **sizes) == (1, 8, 256, 16)
    assert strides_of(AxisOrder.PP_DP_CP_TP, **sizes) == (128, 64, 16, 1)
    assert replica_spacing(Plan(**sizes)) == 8
    assert replica_spacing(Plan(**sizes, order=1)) == Lattice(near=8, inner=2, far=256)


def test_every_order_has_its_name() -> None:
    assert len(ORDERS) == math.factorial(4) == len({o.axes for o in AxisOrder})
    for order in AxisOrder:
        assert order_named(order.label.upper()) is order and sorted(order.axes) == sorted(AXES)
    assert AxisOrder(0).label == "tp-cp-dp-pp"
    assert "tp-" not in str(Plan(dp=2)) and str(Plan(dp=2, order=1)) == (
        "dp2 tp1 pp1 tp-cp-pp-dp mb1 recompute-none zero0"
    )
    with pytest.raises(InputError, match="did you mean tp-cp-dp-pp"):
        order_named("tp-cp-dp-p")
    with pytest.raises(InputError, match="order 24 is none of 24"):
        axis_strides(Plan(order=24))


def test_experts_that_cannot_be_laid_out_are_told() -> None:
    """Eight ranks a stage, four of them inside pp: groups of 2, 4 and 8 nest, of 3 would not."""
    inside = Plan(tp=1, cp=4, dp=2, pp=2, order=AxisOrder.TP_CP_PP_DP)
    for ep in (1, 2, 4, 8):
        check_experts(MIXTRAL, replace(inside, ep=ep))
    over = Plan(tp=1, cp=4, dp=6, pp=2, ep=6, order=AxisOrder.TP_CP_PP_DP)
    assert len(misplaced_experts(over)) == 1
    with pytest.raises(InputError, match="whole blocks of them: change ep, or give an order"):
        check_experts(MIXTRAL, replace(inside, tp=2, cp=3, dp=4, ep=4))
    with pytest.raises(InputError, match="side by side: give an order that begins with tp"):
        check_experts(MIXTRAL, Plan(tp=2, cp=4, order=AxisOrder.CP_TP_DP_PP))
    check_experts(MIXTRAL, Plan(tp=2, cp=4, etp=1, ep=8, order=AxisOrder.CP_TP_DP_PP))

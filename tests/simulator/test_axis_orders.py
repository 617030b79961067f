"""Orders of the axes in steps: bytes by hand, axes of one rank, arrays against plans one by one."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.cluster import Cluster
from simulator.network import estimate_collective, members_in
from simulator.network_topology import mesh_frac
from simulator.pieces import send_seconds
from simulator.planners.axis_orders import USEFUL
from simulator.recipe import RECIPES
from simulator.stack import STACKS, OnDevice
from simulator.step import data_exchange, step_seconds, training_step
from simulator.timeline import simulate_training
from tests.simulator.random_plans import CLUSTERS, random_cases
from workloads.axis_order import AxisOrder, Lattice
from workloads.models.config import load_hf_config
from workloads.models.parameters import StageParameters
from workloads.models.transformer import train_step
from workloads.ops.collective import Collective
from workloads.placement import misplaced_experts, replica_spacing
from workloads.plan import Plan

BF16 = RECIPES["bf16"]
GPT2 = load_hf_config("examples/gpt2.json")
MIXTRAL = load_hf_config("examples/mixtral-8x7b.json")
ORDERS = [int(o) for o in AxisOrder]


def two_nodes_of_four() -> Cluster:
    """NVLink of 450 GB/s inside, 50 GB/s a rank between."""
    on = catalog.cluster("hgx-h100", nodes=2)
    inner = replace(on.levels[0], size=4.0)
    return replace(on, accelerators_per_node=4, levels=(inner, *on.levels[1:]))


HELD = StageParameters(dense=10**9, experts=0)


def exchanged(plan: Plan, on: Cluster) -> tuple[float, float]:
    """Seconds in which gradients of 4 GB are reduced and an activation is sent."""
    moved = data_exchange(GPT2, plan, on, BF16, HELD)
    sent = send_seconds(GPT2, 1024, plan, on, BF16)
    return float(moved.reduce_s), float(sent)


def test_stages_inside_a_node_by_hand() -> None:
    """dp2 pp4: replicas side by side and stages across nodes, or the other way round."""
    on, plan = two_nodes_of_four(), Plan(dp=2, pp=4)
    activation, gradients = 1024 * 768 * 2, 4e9
    reduce_s, send_s = exchanged(plan, on)  # replicas 1 apart, stages 2 apart: 2 of 4 in a node
    assert reduce_s == pytest.approx(2 * gradients / 2 / 450e9, rel=1e-12)
    assert send_s == pytest.approx(activation / 50e9, rel=1e-12)
    reduce_s, send_s = exchanged(replace(plan, order=AxisOrder.TP_CP_PP_DP), on)
    assert reduce_s == pytest.approx(2 * gradients / 2 / 50e9, rel=1e-12)
    assert send_s == pytest.approx(activation / 450e9, rel=1e-12)


def test_replicas_that_stages_cut_by_hand() -> None:
    """cp2 pp2 dp2 (cp inside, then pp): replicas are two ranks in each of two nodes, 4 apart."""
    on = two_nodes_of_four()
    plan = Plan(dp=2, cp=2, pp=2, order=AxisOrder.TP_CP_PP_DP)
    assert replica_spacing(plan) == Lattice(near=1, inner=2, far=4)
    reduced = Collective("all_reduce", 4 * 10**9, 4)
    levels = list(
        estimate_collective(reduced, on=on, stride=replica_spacing(plan)).seconds_by_level.values()
    )
    inside = 2 * (1 / 2) * 4e9 / 450e9  # between the two of a node, all of the buffer
    across = 2 * (1 / 2) * 2e9 / 50e9  # between the nodes, each rank its half
    assert levels == pytest.approx([inside, across], rel=1e-12)
    usual = estimate_collective(reduced, on=on, stride=replica_spacing(replace(plan, order=0)))
    assert list(usual.seconds_by_level.values())[1] == 0  # all four in one node
    apart = AxisOrder.PP_DP_CP_TP  # pp inside: replicas 2 apart, again two in each node
    spaced = replica_spacing(replace(plan, order=apart))
    assert list(estimate_collective(reduced, on=on, stride=spaced).seconds_by_level.values()) == (
        pytest.approx([inside, across], rel=1e-12)
    )


@given(
    near=st.sampled_from([1, 2, 4]), inner=st.sampled_from([1, 2, 4]),
    gap=st.sampled_from([1, 2, 4]), runs=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([2, 4, 8, 16, 32]),
)  # fmt: skip
def test_members_of_a_lattice_are_those_counted(
    near: int, inner: int, gap: int, runs: int, size: int
) -> None:
    far, n = near * inner * gap, inner * runs
    group = [run * far + i * near for run in range(runs) for i in range(inner)]
    inside = sum(rank < size for rank in group)
    assert members_in(n, size, Lattice(near=near, inner=inner, far=far)) == inside
    many = Lattice(near=np.array([1.0 * near]), inner=np.array([1.0 * inner]), far=1.0 * far)
    assert np.asarray(members_in(1.0 * n, size, many)).tolist() == [inside]


def test_a_mesh_gives_a_lattice_the_links_among_its_ranks() -> None:
    """A DGX-1's cube mesh: ranks 0, 1, 4, 5 in the order of the node."""
    on = catalog.cluster("dgx-1-v100")
    counts = np.array(on.extra["link_counts"])
    groups = [[0, 1, 4, 5], [2, 3, 6, 7]]
    expected = min(counts[i, g].sum() / counts[i].sum() for g in groups for i in g)
    lattice = Lattice(near=1, inner=2, far=4)
    assert mesh_frac(on, on.levels[0], 4, lattice) == pytest.approx(expected, rel=1e-12)
    even = Lattice(near=1, inner=2, far=2)
    assert mesh_frac(on, on.levels[0], 4, even) == mesh_frac(on, on.levels[0], 4, 1)


# ---- whole steps ---------------------------------------------------------------------------


def test_a_slower_network_is_felt_where_the_order_puts_it() -> None:
    """With stages inside a node a step sends over NVLink: only replicas feel the network."""
    step, on = train_step(GPT2, len_seq=4096, global_batch=64), two_nodes_of_four()
    slow = replace(on, levels=(on.levels[0], replace(on.levels[1], bytes_per_s=5e9)))
    for order, piece in ((0, "pipeline sends"), (1, "data parallel")):
        plan = Plan(dp=2, pp=4, order=order)
        one, other = (training_step(step, plan=plan, on=c, recipe=BF16) for c in (on, slow))
        a, b = one.seconds_by_piece, other.seconds_by_piece
        assert {k for k in a if a[k] != b[k]} == {piece}


@settings(max_examples=60, deadline=None)
@given(
    order=st.sampled_from(ORDERS), other=st.sampled_from(ORDERS), seed=st.integers(0, 19),
    calibrated=st.booleans(),
)  # fmt: skip
def test_orders_of_axes_of_one_rank_change_nothing(
    order: int, other: int, seed: int, calibrated: bool
) -> None:
    step, plan, stack, which = CASES[seed]
    named = [[a for a in AxisOrder(o).axes if getattr(plan, a) > 1] for o in (order, other)]
    if named[0] != named[1]:
        return
    one, two = (
        training_step(
            step, plan=replace(plan, order=o), on=CLUSTERS[which], recipe=BF16,
            stack=stack if calibrated else None,
        ) for o in (order, other)
    )  # fmt: skip
    assert one.seconds_by_piece == two.seconds_by_piece
    assert (one.lower_s, one.upper_s) == (two.lower_s, two.upper_s)


CASES = random_cases(4, 20)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("cfg", [GPT2, MIXTRAL])
def test_arrays_of_orders_agree_with_plans_one_by_one(cfg: object, calibrated: bool) -> None:
    rng, on = np.random.default_rng(8), catalog.cluster("hgx-h100", nodes=8)
    step = train_step(cfg, len_seq=4096, global_batch=64)  # type: ignore[arg-type]
    moe = step.config.moe is not None
    columns = {
        "tp": rng.choice([1.0, 2.0, 4.0], 60), "cp": rng.choice([1.0, 2.0, 4.0], 60),
        "dp": rng.choice([1.0, 2.0, 4.0], 60), "pp": rng.choice([1.0, 2.0, 4.0], 60),
        "order": rng.choice([0.0, 1.0, 2.0, 5.0], 60), "zero_stage": rng.choice([0.0, 1.0], 60),
        "ep": rng.choice([1.0, 2.0], 60) if moe else np.ones(60),
    }  # fmt: skip
    columns["ep"] = np.minimum(columns["ep"], columns["dp"] * columns["cp"])
    plans = Plan(**columns)
    assert not misplaced_experts(plans)
    stack = OnDevice(stack=STACKS["megatron"], factors=CASES[0][2].factors) if calibrated else None
    many = training_step(step, plan=plans, on=on, recipe=BF16, stack=stack)
    fast = step_seconds(step, plan=plans, on=on, recipe=BF16, stack=stack)
    for i in range(0, 60, 3):
        one = training_step(step, plan=plans.at(i), on=on, recipe=BF16, stack=stack)
        assert np.asarray(many.seconds)[i] == pytest.approx(float(one.seconds), rel=1e-9)
        assert np.asarray(many.upper_s)[i] == pytest.approx(float(one.upper_s), rel=1e-9)
        assert np.asarray(fast)[i] == pytest.approx(float(one.seconds), rel=1e-9)


def test_the_timeline_follows_the_order() -> None:
    """Sends of the timeline are those of the order; the sum of pieces agrees as it does else."""
    step, on = train_step(GPT2, len_seq=4096, global_batch=64), two_nodes_of_four()
    rng = random.Random(1)
    for order in rng.sample(ORDERS, 4):
        plan = Plan(dp=2, pp=4, order=order)
        found = simulate_training(step, plan=plan, on=on, recipe=BF16)
        inside = AxisOrder(order).axes.index("pp") < AxisOrder(order).axes.index("dp")
        rate = 450e9 if inside else 50e9
        assert found.layers.send == pytest.approx(4096 * 768 * 2 / rate, rel=1e-12)


def test_useful_orders_begin_with_tp_and_have_cp_inside_dp() -> None:
    for order in AxisOrder:
        axes = order.axes
        useful = axes[0] == "tp" and axes.index("cp") < axes.index("dp")
        assert useful == (order in USEFUL)
    assert [f.name for f in fields(Plan)][-1] == "order"

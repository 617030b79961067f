"""Orders of the axes in the planner: what is dropped costs the same, what is kept is searched."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.cluster import Cluster
from hwmodels.errors import InfeasibleError
from simulator.distinct import distinct
from simulator.memory import training_memory
from simulator.network import bound_seconds, calibrated_seconds
from simulator.planners.axis_orders import MESH, USEFUL, boundaries, groups, with_orders
from simulator.planners.parallelism import plan_parallelism, plan_space, select
from simulator.recipe import RECIPES
from simulator.step import training_step
from workloads.models.config import load_hf_config
from workloads.models.transformer import TrainStep, train_step
from workloads.ops.collective import Collective
from workloads.placement import misplaced_experts
from workloads.plan import Plan

BF16 = RECIPES["bf16"]
GPT2 = load_hf_config("examples/gpt2.json")
MIXTRAL = load_hf_config("examples/mixtral-8x7b.json")
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
CLUSTERS = [
    ("hgx-h100", 4), ("dgx-a100-80gb", 3), ("l40s-pcie-8", 2), ("mi300x-8", 1), ("dgx-1-v100", 1),
    ("gb200-nvl72", 2), ("dgx-h100", 64),
]  # fmt: skip


def small_nodes(num: int, nodes: int, name: str = "hgx-h100") -> Cluster:
    """Nodes of `num` accelerators."""
    on = catalog.cluster(name, nodes=nodes)
    inner = replace(on.levels[0], size=float(num))
    return replace(on, accelerators_per_node=num, levels=(inner, *on.levels[1:]))


def rows(plans: Plan) -> Iterator[Plan]:
    return (plans.at(i) for i in range(np.size(plans.dp)))


def prices(plan: Plan, on: Cluster) -> list[float]:
    """Every collective of every group, at the bound and as a library takes it."""
    found = []
    for n, spaced in groups(plan):
        for kind in KINDS:
            if n > 1 and n == int(n):
                op = Collective(kind, 27 * 2**20, int(n))
                found += [
                    float(price(op, on=on, stride=spaced))
                    for price in (bound_seconds, calibrated_seconds)
                ]
    return found


@pytest.mark.parametrize(("name", "nodes"), CLUSTERS)
@pytest.mark.parametrize("cfg", [GPT2, MIXTRAL])
def test_an_order_that_is_dropped_costs_the_same_as_one_that_is_kept(
    name: str, nodes: int, cfg: object
) -> None:
    on, rng = catalog.cluster(name, nodes=nodes), random.Random(f"{name}")
    step = train_step(cfg, len_seq=4096, global_batch=512)  # type: ignore[arg-type]
    space = plan_space(step, on=on)
    space = select(space, np.unique(distinct(space, MESH)[1], return_index=True)[1])
    kept = with_orders(space, on=on, cfg=step.config)
    orders: dict[Plan, set[int]] = {}
    for plan in rows(kept):
        orders.setdefault(replace(plan, order=0), set()).add(int(plan.order))
    assert len(orders) == np.size(space.dp), "every plan is kept in some order"
    assert {0} <= set.union(*orders.values()) <= set(map(int, USEFUL))
    several = [p for p in orders if p.pp > 1]
    for plan in rng.sample(several, min(12, len(several))):
        told = {o: prices(replace(plan, order=o), on) for o in orders[plan]}
        for order in set(USEFUL) - orders[plan]:
            one = replace(plan, order=int(order))
            if cfg is MIXTRAL and misplaced_experts(one):
                continue
            own = prices(one, on)
            assert any(own == pytest.approx(other, rel=1e-9) for other in told.values()), one


def test_orders_that_differ_in_fast_levels_alone_are_one() -> None:
    """The spine of a SuperPOD is as fast as its leaves: only nodes are boundaries."""
    assert boundaries(catalog.cluster("dgx-h100", nodes=128)) == [8]
    on = catalog.cluster("dgx-h100", nodes=128)
    slow = replace(on, levels=(*on.levels[:2], replace(on.levels[2], oversubscription=2.0)))
    assert boundaries(slow) == [8, 256]


# ---- against loops -------------------------------------------------------------------------


def random_question(rng: random.Random) -> tuple[TrainStep, Cluster]:
    on = small_nodes(rng.choice([2, 4]), 2, rng.choice(["hgx-h100", "l40s-pcie-8"]))
    slow = replace(on.levels[-1], oversubscription=rng.choice([1.0, 4.0, 20.0]))
    on = replace(on, levels=(*on.levels[:-1], slow))
    if rng.random() < 0.3:
        assert MIXTRAL.moe is not None
        moe = replace(MIXTRAL.moe, layers=tuple(range(4)), expert_ffn_dim=512)
        cfg = replace(MIXTRAL, num_layers=4, hidden_dim=512, embedding_dim=512, moe=moe)
    else:
        cfg = replace(GPT2, num_layers=rng.choice([4, 6]), vocab_size=rng.choice([512, 50257]))
    return train_step(cfg, len_seq=rng.choice([512, 4096, 32768]), global_batch=8), on


def every_order(
    step: TrainStep, on: Cluster, stages: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order, bytes and seconds of every plan of so many stages in every useful order."""
    space, found = plan_space(step, on=on), []
    space = select(space, np.flatnonzero(np.asarray(space.pp) == stages))
    for order in USEFUL:
        plans = replace(space, order=np.full(np.shape(space.dp), float(order)))
        keep = np.ones(np.shape(space.dp), dtype=bool)
        for bad, _ in misplaced_experts(plans) if step.config.moe else ():
            keep &= ~bad
        some = Plan(**{f.name: np.asarray(getattr(plans, f.name))[keep] for f in fields(Plan)})
        num_bytes = training_memory(step, plan=some, recipe=BF16).total
        seconds = training_step(step, plan=some, on=on, recipe=BF16).seconds
        found.append((np.asarray(some.order), np.asarray(num_bytes), np.asarray(seconds)))
    orders, sizes, times = (np.concatenate(column) for column in zip(*found, strict=True))
    return orders, sizes, times


def test_the_best_order_is_that_of_loops() -> None:
    """300 random questions, some of which another order than the usual one wins."""
    rng, won, impossible = random.Random(5), 0, 0
    for _ in range(95):
        step, on = random_question(rng)
        stages = rng.choice([2, 2, 4])
        orders, sizes, times = every_order(step, on, stages)
        capacity = on.device.hbm.capacity_bytes
        low, middle, high = np.quantile(sizes, [0.02, 0.3, 0.9]) / capacity
        fracs = [rng.uniform(low, middle), rng.uniform(middle, high), high]
        for frac in (*fracs, 0.5 * low) if rng.random() < 0.25 else fracs:
            fits = sizes <= capacity * min(frac, 1.0)
            ask = {
                "on": on,
                "hbm_frac": min(frac, 1.0),
                "num_runners_up": 0,
                "pins": {"pp": stages},
            }
            if not fits.any():
                impossible += 1
                with pytest.raises(InfeasibleError):
                    plan_parallelism(step, **ask)  # type: ignore[arg-type]
                continue
            found = plan_parallelism(step, **ask)  # type: ignore[arg-type]
            best, usual = times[fits].min(), times[fits & (orders == 0)].min(initial=np.inf)
            assert float(found.best.step.seconds) == pytest.approx(best, rel=1e-9)
            won += best < usual * (1 - 1e-6)
            assert found.plan.order == 0 or best < usual
    assert won > 20 and impossible > 10, (won, impossible)

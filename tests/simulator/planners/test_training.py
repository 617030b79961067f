"""The training planner against loops over its space, its bounds, its refusals, the two bars."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import fields, replace

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.cluster import Cluster
from hwmodels.errors import InfeasibleError, InputError
from simulator.layer_modes import FULL, NONE, OFFLOAD, OFFLOAD_FULL, layer_kinds
from simulator.planners.axis_orders import USEFUL
from simulator.planners.figures import Question, figures_of, rank_limits
from simulator.planners.parallelism import plan_parallelism, select
from simulator.planners.sequence_splits import ANY
from simulator.planners.stages import best_layout
from simulator.planners.training import asked_of, groups_of, plan_training, training_space
from simulator.recipe import RECIPES
from simulator.staged import StageLayers, stage_costs, staged_memory, staged_step
from simulator.staged_timeline import simulate_staged
from workloads.axis_order import AxisOrder
from workloads.models.config import TransformerConfig, load_hf_config
from workloads.models.transformer import TrainStep, train_step
from workloads.plan import Plan, Recompute

BF16 = RECIPES["bf16"]
GPT2 = load_hf_config("examples/gpt2.json")
MIXTRAL = load_hf_config("examples/mixtral-8x7b.json")


def small(layers: int, batch: int, *, seq: int = 1024, wide: bool = False) -> TrainStep:
    cfg = replace(GPT2, num_layers=layers)
    if wide:
        cfg = replace(cfg, vocab_size=400_000)
    return train_step(cfg, len_seq=seq, global_batch=batch)


def node(num: int, nodes: int = 1) -> Cluster:
    return replace(catalog.cluster("dgx-a100-80gb", nodes=nodes), accelerators_per_node=num)


def by_loop(
    step: TrainStep, on: Cluster, budget: float, host: float, pins: dict[str, int]
) -> float:
    """Every mesh, every split, every number of layers in every mode, priced by `staged_step`.

    On several nodes in every useful order of the axes, whether the planner drops it or not.
    """
    asked = asked_of(step, on, BF16, rank_limits(budget, on, host), None, pins, ANY)
    limits = asked.question.limits
    best = math.inf
    for group in groups_of(asked):
        plans = {group.plan(index) for index in range(group.size)}
        if on.num_nodes > 1:
            plans = {replace(plan, order=int(order)) for plan in plans for order in USEFUL}
        for plan in plans:
            for stages in every_layout(step, plan, host > 0):
                costs = stage_costs(step, plan=plan, stages=stages, on=on, recipe=BF16)
                if float(staged_memory(costs).total) > budget * (1 + 1e-12):
                    continue
                if any(
                    c.host_bytes > limits.host_bytes * (1 + 1e-12)
                    or c.copied_bytes > limits.host_bytes_per_s * c.forward_s * (1 + 1e-12)
                    for c in costs
                ):
                    continue
                found = staged_step(step, costs, plan=plan, on=on, recipe=BF16)
                best = min(best, float(found.seconds))
    return best


def every_layout(step: TrainStep, plan: Plan, host: bool) -> list[tuple[StageLayers, ...]]:
    """Splits into multiples of v, and every way to give a stage's layers their modes."""
    total, p, v = step.config.num_layers, int(plan.pp), int(plan.interleave)
    kinds, sequence = layer_kinds(step.config)
    names = (NONE, FULL, OFFLOAD, OFFLOAD_FULL) if host else (NONE, FULL)
    found = []
    for sizes in itertools.product(range(v, total + 1, v), repeat=p):
        if sum(sizes) != total or (len(kinds) > 1 and v > 1 and len(set(sizes)) > 1):
            continue
        options = []
        for own in held(sequence, sizes, p, v, len(kinds) == 1):
            ways = [
                list(itertools.combinations_with_replacement(names, own.count(k)))
                for k in range(len(kinds))
            ]
            options.append(
                [
                    StageLayers(
                        counts={
                            kinds[k].name: {m: way.count(m) for m in names if way.count(m)}
                            for k, way in enumerate(each)
                            if way
                        }
                    )
                    for each in itertools.product(*ways)
                ]
            )
        found += list(itertools.product(*options))
    return found


def held(
    sequence: tuple[int, ...], sizes: tuple[int, ...], p: int, v: int, alike: bool
) -> list[list[int]]:
    if v == 1 or alike:
        ends = list(itertools.accumulate(sizes))
        return [list(sequence[e - s : e]) for e, s in zip(ends, sizes, strict=True)]
    size = len(sequence) // (p * v)
    return [
        [sequence[(c * p + i) * size + j] for c in range(v) for j in range(size)] for i in range(p)
    ]


CASES = [
    # layers, batch, GPUs, budget GB, host GB of a node, pins, wide vocabulary
    (2, 2, 2, 3.0, 0.0, {}, False),
    (3, 2, 2, 1.9, 0.0, {}, False),
    (3, 4, 2, 1.5, 8.0, {"micro_batch": 2}, False),
    (4, 4, 4, 1.2, 0.0, {"tp": 1, "cp": 1}, False),
    (4, 4, 2, 1.45, 0.0, {"pp": 2}, True),
    (4, 4, 4, 2.4, 0.0, {"pp": 4}, True),
    (3, 4, 2, 0.02, 0.0, {}, False),
    (3, 2, 2, 1.3, 4.0, {"pp": 2}, False),
]


@pytest.mark.parametrize(("layers", "batch", "gpus", "budget", "host", "pins", "wide"), CASES)
def test_the_plan_is_that_of_a_loop(
    layers: int, batch: int, gpus: int, budget: float, host: float, pins: dict[str, int], wide: bool
) -> None:
    step, on = small(layers, batch, wide=wide), node(gpus)
    best = by_loop(step, on, budget * 1e9, host * 1e9, pins)
    ask = {"on": on, "budget_bytes": budget * 1e9, "host_bytes_per_node": host * 1e9, "pins": pins}
    if math.isinf(best):
        with pytest.raises(InfeasibleError):
            plan_training(step, **ask)  # type: ignore[arg-type]
        return
    found = plan_training(step, **ask)  # type: ignore[arg-type]
    assert float(found.best.step.seconds) == pytest.approx(best, rel=1e-9)
    assert (found.status, found.gap_frac) == ("optimal", 0.0)


@pytest.mark.parametrize(
    ("seq", "gpus", "budget", "pins", "slower", "order"),
    [
        (65536, 4, 60.0, {"pp": 2, "dp": 2, "micro_batch": 1}, 20.0, AxisOrder.TP_CP_PP_DP),
        (65536, 4, 60.0, {"pp": 2, "micro_batch": 1, "tp": 1}, 1.0, AxisOrder.TP_CP_DP_PP),
        (16384, 8, 60.0, {"pp": 2, "cp": 2, "tp": 1}, 1.0, AxisOrder.TP_CP_PP_DP),
        (1024, 4, 0.02, {"pp": 2, "tp": 1, "cp": 1}, 1.0, None),
    ],
)
def test_the_order_is_that_of_a_loop(
    seq: int, gpus: int, budget: float, pins: dict[str, int], slower: float,
    order: AxisOrder | None,
) -> None:  # fmt: skip
    """Two nodes, over links slower and slower: an order other than the usual may win."""
    step, on = small(3, 8, seq=seq), node(gpus // 2, nodes=2)
    inner = replace(on.levels[0], size=gpus / 2)
    outer = replace(on.levels[1], bytes_per_s=on.levels[1].bytes_per_s / slower)
    on = replace(on, levels=(inner, outer))
    best = by_loop(step, on, budget * 1e9, 0.0, pins)
    if order is None:
        assert math.isinf(best)
        return
    found = plan_training(step, on=on, budget_bytes=budget * 1e9, pins=pins)
    assert float(found.best.step.seconds) == pytest.approx(best, rel=1e-9)
    assert (found.status, found.gap_frac) == ("optimal", 0.0)
    assert found.plan.order == order
    meshes = [tuple(getattr(c.plan, a) for a in ("dp", "tp", "cp"))
              for c in (found.best, *found.runners_up)]  # fmt: skip
    assert len(set(meshes)) == len(meshes), "a mesh is told in its best order alone"
    pinned = plan_training(
        step, on=on, budget_bytes=budget * 1e9, pins={**pins, "order": int(order)}
    )
    assert float(pinned.best.step.seconds) == float(found.best.step.seconds)


def test_mixed_kinds_are_that_of_a_loop() -> None:
    """Two dense layers, then two with experts: a split that even stages do not have."""
    assert MIXTRAL.moe is not None
    moe = replace(MIXTRAL.moe, layers=(2, 3), expert_ffn_dim=2048)
    cfg = replace(MIXTRAL, num_layers=4, hidden_dim=1024, embedding_dim=1024, moe=moe)
    step, on = train_step(cfg, len_seq=1024, global_batch=2), node(2)
    for budget, host in ((8e9, 0.0), (4.1e9, 0.0)):
        best = by_loop(step, on, budget, host, {"pp": 2, "micro_batch": 1})
        found = plan_training(
            step,
            on=on,
            budget_bytes=budget,
            host_bytes_per_node=host,
            pins={"pp": 2, "micro_batch": 1},
        )
        assert float(found.best.step.seconds) == pytest.approx(best, rel=1e-9)


def case_of(name: str, cluster: str, nodes: int, batch: int, seq: int) -> tuple[TrainStep, Cluster]:
    cfg = load_hf_config(f"examples/{name}.json")
    return train_step(cfg, len_seq=seq, global_batch=batch), catalog.cluster(cluster, nodes=nodes)


@pytest.mark.parametrize(
    ("name", "cluster", "nodes", "batch", "seq"),
    [
        ("llama3-8b", "hgx-h100", 1, 8, 8192),
        ("gpt2", "hgx-h100", 3, 12, 1024),
        ("llama3-70b", "hgx-h100", 8, 64, 8192),
    ],
)
def test_no_plan_with_equal_stages_is_faster(
    name: str, cluster: str, nodes: int, batch: int, seq: int
) -> None:
    step, on = case_of(name, cluster, nodes, batch, seq)
    for frac in (0.92, 0.6):
        found = plan_training(step, on=on, hbm_frac=frac)
        even = plan_parallelism(step, on=on, hbm_frac=frac)
        best = float(found.best.step.seconds)
        assert best <= float(even.best.step.seconds) * (1 + 1e-9)
        assert found.num_feasible == even.num_feasible
        for c in (found.best, *found.runners_up):
            assert float(c.memory.total) <= found.budget_bytes * (1 + 1e-9)
            assert sum(s.num_layers for s in c.stages) == step.config.num_layers
            again = stage_costs(step, plan=c.plan, stages=c.stages, on=on, recipe=BF16)
            assert float(c.memory.total) == float(staged_memory(again).total)
        seconds = [float(c.step.seconds) for c in (found.best, *found.runners_up)]
        assert seconds == sorted(seconds)


@pytest.mark.parametrize("name", ["llama3-8b", "mixtral-8x7b", "linear-llama3-1b"])
def test_bounds_are_below_what_meshes_take_and_need(name: str) -> None:
    step, on = case_of(name, "hgx-h100", 2, 32, 4096)
    limits = rank_limits(on.device.hbm.capacity_bytes, on)
    question = Question(step=step, on=on, recipe=BF16, limits=limits)
    space = training_space(step, on=on)
    rng = np.random.default_rng(1)
    some = select(space, np.sort(rng.choice(np.size(space.dp), 60, replace=False)))
    if step.config.num_linear_layers:
        some = select(some, np.flatnonzero(np.asarray(some.cp) == 1))
    group = figures_of(question, some)
    for i in range(group.size):
        layout = best_layout(group.problem(i))
        if layout is None:
            continue
        assert group.bounds[i] <= layout.seconds * (1 + 1e-12)
        assert group.least_bytes[i] <= limits.budget_bytes
        lean = replace(limits, budget_bytes=float(group.least_bytes[i]) * 0.999)
        assert best_layout(group.problem(i, lean)) is None


BARS = [
    ("megatron-1t", "dgx-a100-80gb", 384, 3072, 2048),
    ("llama3-405b", "dgx-h100", 2048, 2048, 8192),
]


@pytest.mark.parametrize("case", BARS)
@pytest.mark.parametrize("budget", [None, 48e9, 36e9, 28e9])
def test_large_questions_are_proven_in_two_seconds(
    case: tuple[str, str, int, int, int], budget: float | None
) -> None:
    step, on = case_of(*case)
    found = plan_training(step, on=on, budget_bytes=budget)
    assert (found.status, found.gap_frac) == ("optimal", 0.0)
    assert found.solve_s <= 2.0
    assert float(found.best.memory.total) <= found.budget_bytes


def test_a_limit_or_a_gap_ends_the_search_and_is_told() -> None:
    step, on = case_of("llama3-70b", "hgx-h100", 8, 64, 8192)
    exact = plan_training(step, on=on)
    for early in (
        plan_training(step, on=on, time_limit_s=1e-9, num_runners_up=0),
        plan_training(step, on=on, gap_frac=0.5, num_runners_up=0),
    ):
        best = float(exact.best.step.seconds)
        assert float(early.best.step.seconds) * (1 - early.gap_frac) <= best * (1 + 1e-12)
        assert (early.status == "optimal") == (early.gap_frac == 0)
    assert plan_training(step, on=on, time_limit_s=1e-9).status == "feasible"


def test_uneven_stages_lighten_the_one_with_the_head() -> None:
    found = plan_training(small(12, 16, wide=True), on=node(4), pins={"pp": 4, "interleave": 1})
    sizes = [s.num_layers for s in found.best.stages]
    assert sizes[-1] < max(sizes)
    costs = [c.seconds for c in found.best.costs]
    timeline = simulate_staged(
        small(12, 16, wide=True), plan=found.plan, stages=found.best.stages, on=node(4), recipe=BF16
    )
    assert max(costs) * 16 < timeline.seconds
    assert timeline.seconds == pytest.approx(float(found.best.step.seconds), rel=0.05)


def test_a_pinned_recomputation_leaves_its_modes() -> None:
    step, on = small(4, 8), node(2)
    found = plan_training(step, on=on, pins={"recompute": int(Recompute.FULL)})
    assert {m for s in found.best.stages for m in s.modes} == {FULL}
    assert found.plan.recompute == Recompute.FULL


def test_what_does_not_fit_is_told_with_every_way_out() -> None:
    step, on = case_of("llama3-70b", "hgx-h100", 4, 32, 8192)
    with pytest.raises(InfeasibleError) as caught:
        plan_training(step, on=on, budget_bytes=40e9, pins={"tp": 1, "pp": 1})
    message = str(caught.value)
    more = re.search(r"([\d.]+) GB more", message)
    nodes = re.search(r"fits on (\d+) nodes", message)
    pins = re.findall(r"(\w+) not pinned to 1", message)
    assert more and "\n" not in message
    pinned = {"tp": 1, "pp": 1}
    enough = 40e9 + float(more[1]) * 1e9 + 1e7
    assert plan_training(step, on=on, budget_bytes=enough, pins=pinned).status == "optimal"
    with pytest.raises(InfeasibleError):
        plan_training(step, on=on, budget_bytes=enough - 0.1e9, pins=pinned)
    for name in ("tp", "pp"):
        rest = {k: v for k, v in pinned.items() if k != name}
        try:
            plan_training(step, on=on, budget_bytes=40e9, pins=rest)
        except InfeasibleError:
            assert name not in pins
        else:
            assert name in pins
    if nodes:
        larger = replace(on, num_nodes=int(nodes[1]))
        assert plan_training(step, on=larger, budget_bytes=40e9, pins=pinned).status == "optimal"


def test_bad_limits_are_refused() -> None:
    step, on = small(4, 8), node(2)
    with pytest.raises(InputError, match="budget of 90 GB is not within"):
        plan_training(step, on=on, budget_bytes=90e9)
    with pytest.raises(InputError, match="no link to the host"):
        plan_training(step, on=replace(on, side_levels=()), host_bytes_per_node=1e12)
    with pytest.raises(InputError, match="tp=5 does not divide the 12 query heads"):
        plan_training(step, on=on, pins={"tp": 5})


def test_the_answer_is_the_same_every_time() -> None:
    step, on = case_of("mixtral-8x7b", "hgx-h100", 2, 16, 4096)
    one, two = (plan_training(step, on=on) for _ in range(2))
    assert one.plan == two.plan
    assert one.best.stages == two.best.stages
    assert [c.plan for c in one.runners_up] == [c.plan for c in two.runners_up]
    names = [f.name for f in fields(Plan)]
    assert all(getattr(one.plan, n) == getattr(two.plan, n) for n in names)


def config(name: str) -> TransformerConfig:
    return load_hf_config(f"examples/{name}.json")


def test_hybrid_stacks_have_modes_by_kind() -> None:
    """A quarter of the layers with softmax attention: their kind is recomputed or not by itself."""
    cfg = replace(config("llama3-8b"), num_linear_layers=24)
    step, on = train_step(cfg, len_seq=8192, global_batch=16), catalog.cluster("hgx-h100", nodes=1)
    found = plan_training(step, on=on, pins={"cp": 1}, budget_bytes=40e9)
    kinds = {k for s in found.best.stages for k in s.counts}
    assert kinds == {"dense", "dense linear"}
    assert sum(sum(s.counts["dense linear"].values()) for s in found.best.stages) == 24

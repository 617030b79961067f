"""Checkmate's program: every schedule replays within its budget, and none is cheaper."""

from __future__ import annotations

import random

import pytest

from hwmodels.errors import InfeasibleError, InputError
from simulator.planners.program import solve
from simulator.planners.rematerialise import Graph, Node, least_budget, plan, program


def brute_force(graph: Graph, budget: float) -> float | None:
    """Cheapest way over all sets computed in and kept between stages; None: there is none."""
    num = len(graph.nodes)
    costs: dict[frozenset[int], float] = {frozenset(): 0.0}
    for t in range(num):
        after: dict[frozenset[int], float] = {}
        for kept, cost in costs.items():
            for chosen in range(1 << t):
                stage = {i for i in range(t) if chosen >> i & 1} | {t}
                if any(i not in stage and i not in kept for k in stage for i in graph.reads[k]):
                    continue
                seconds = cost + sum(graph.nodes[i].seconds for i in stage)
                pool = sorted(kept | stage)
                for bits in range(1 << len(pool)):
                    left = frozenset(i for b, i in enumerate(pool) if bits >> b & 1)
                    if seconds < after.get(left, float("inf")) and fits(
                        graph, kept, stage, left, budget
                    ):
                        after[left] = seconds
        costs = after
    return min(costs.values(), default=None)


def fits(
    graph: Graph, kept: frozenset[int], stage: set[int], left: frozenset[int], budget: float
) -> bool:
    def needed(i: int, k: int) -> bool:
        return i in left or any(j in stage and j > k for j in graph.readers[i])

    held = {i for i in kept if needed(i, -1)}
    for k in sorted(stage):
        held |= {k}
        if graph.fixed_bytes + sum(graph.nodes[i].num_bytes for i in held) > budget + 1e-9:
            return False
        held = {i for i in held if needed(i, k)}
    return True


def random_graph(rng: random.Random, num: int) -> Graph:
    nodes = [
        Node(
            name=f"n{i}", seconds=rng.randint(1, 9), num_bytes=rng.randint(1, 9),
            reads=tuple(f"n{j}" for j in range(i) if rng.random() < 0.55),
        )
        for i in range(num)
    ]  # fmt: skip
    return Graph(nodes=tuple(nodes), fixed_bytes=rng.choice([0.0, 2.5]))


def chain(num: int) -> Graph:
    """Forward and backward of a chain of equal layers."""
    nodes = [Node(name="f0", seconds=1, num_bytes=1)]
    nodes += [Node(name=f"f{i}", seconds=1, num_bytes=1, reads=(f"f{i - 1}",))
              for i in range(1, num)]  # fmt: skip
    above = f"f{num - 1}"
    for i in reversed(range(num)):
        reads = (above, f"f{i}") if i == 0 else (above, f"f{i}", f"f{i - 1}")
        nodes.append(Node(name=f"b{i}", seconds=2, num_bytes=1, reads=tuple(dict.fromkeys(reads))))
        above = f"b{i}"
    return Graph(nodes=tuple(nodes))


def test_planner_and_brute_force_agree() -> None:
    rng = random.Random(5)
    outcomes = set()
    for _ in range(60):
        graph = random_graph(rng, rng.randint(2, 5))
        whole = graph.fixed_bytes + sum(node.num_bytes for node in graph.nodes)
        budget = rng.uniform(0.5, 1.0) * whole
        best = brute_force(graph, budget)
        if best is None:
            with pytest.raises(InfeasibleError) as told:
                plan(graph, budget)
            least = float(str(told.value).split()[-2])
            assert brute_force(graph, least) is not None
            assert brute_force(graph, least - 1e-3) is None
            outcomes.add("infeasible")
            continue
        found = plan(graph, budget)
        assert found.solution.status == "optimal"
        assert found.schedule.seconds == pytest.approx(best, abs=1e-9)
        assert found.lower_s == pytest.approx(best, abs=1e-9)
        assert found.schedule.peak_bytes <= budget + 1e-9
        outcomes.add("again" if found.schedule.recomputed else "once")
    assert outcomes == {"infeasible", "again", "once"}


def test_with_room_for_everything_nothing_is_computed_again() -> None:
    graph = chain(6)
    found = plan(graph, 12.0)
    assert found.schedule.seconds == graph.seconds == 18.0
    assert found.overhead_frac == 0 and found.schedule.recomputed == {}


def test_a_chain_pays_more_as_memory_shrinks() -> None:
    graph = chain(5)
    least, proven = least_budget(graph)
    assert proven
    costs = [plan(graph, budget).schedule.seconds for budget in (least, least + 1, least + 2, 12)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1] == graph.seconds
    with pytest.raises(InfeasibleError, match="the least that works is"):
        plan(graph, least - 0.5)


def test_a_time_limit_is_told() -> None:
    graph = chain(14)
    try:
        found = plan(graph, 6.0, time_limit_s=0.5)
    except InfeasibleError as told:
        assert "more time" in str(told) or "least" in str(told) or "enough" in str(told)
        return
    assert found.solution.status in ("feasible", "optimal")
    assert found.lower_s <= found.schedule.seconds * (1 + 1e-9)
    assert found.schedule.peak_bytes <= 6.0 + 1e-9


def test_a_budget_below_what_stands_still_is_infeasible() -> None:
    graph = Graph(nodes=chain(2).nodes, fixed_bytes=10.0)
    with pytest.raises(InfeasibleError, match=r"12\.?\d* bytes|13 bytes"):
        plan(graph, 9.0)


def test_the_program_has_checkmates_variables() -> None:
    question = program(chain(2), 4.0)
    names = {one.name for one in question.variables}
    assert {"R[3,3]", "R[3,0]", "S[3,2]", "F[3,0,3]", "U[3,3]"} <= names
    assert "S[0,0]" not in names and "R[0,1]" not in names
    assert solve(question).status == "optimal"


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ([], "no nodes"),
        ([Node(name="a", seconds=1, num_bytes=1)] * 2, "occurs twice"),
        ([Node(name="a", seconds=1, num_bytes=1, reads=("b",))], "no earlier node"),
        ([Node(name="a", seconds=-1, num_bytes=1)], "negative"),
        ([Node(name=f"n{i}", seconds=1, num_bytes=1) for i in range(65)], "more than 64"),
    ],
)
def test_bad_graphs_are_refused(nodes: list[Node], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Graph(nodes=tuple(nodes))

"""What of a graph to keep and what to compute again within a memory budget (Checkmate).

Node i of a DAG takes C_i seconds and its output M_i bytes; nodes are numbered in an order that
respects the edges, and the goal is to compute each at least once. Stage t ends with the first
computation of node t. R_ti: node i is computed in stage t; S_ti: its output is kept from stage
t - 1 into stage t:

    min  sum_(t, i) C_i R_ti
    s.t. R_tt = 1,   R_ti = 0 for i > t,   S_ti = 0 for i >= t                               (1)
         R_tj <= R_ti + S_ti                               for every edge i -> j             (2)
         S_ti <= R_(t-1)i + S_(t-1)i                                                         (3)
         U_t0 = M_0 R_t0 + sum_i M_i S_ti + fixed                                            (4)
         U_tk = U_t(k-1) + M_k R_tk - sum_(i in pred(k-1) + {k-1}) M_i F_ti(k-1)             (5)
         U_tk <= budget

F_tik = 1: node i's output is freed in stage t once k is computed. With h = (1 - R_tk) + S_(t+1)i +
sum_(j in succ(i), j > k) R_tj counting the reasons not to,

    1 - F_tik <= h <= kappa (1 - F_tik),     kappa the number of terms of h                  (6)

U_tk counts node k's output beside all that is kept at that moment. Without a budget the optimum is
sum_i C_i; the least budget any schedule needs is found by minimising the peak instead.

Source: Jain et al. 2020 (Checkmate, arXiv 1910.02653), equations 1 to 8, the partitioned form
(section 4.7); parasj/checkmate, gurobi_solver.py. Implemented in: `program` (1 to 6), `plan`
(schedule and its replay), `Schedule.peak_bytes` (the replay, apart from the rows). Sizes are scaled
to the largest output and costs to the largest node, for the solver's tolerances.

Ignored: a node computed twice within one stage; an order of nodes other than the given one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from hwmodels.errors import InfeasibleError, InputError
from hwmodels.units import GIB
from simulator.planners.program import (
    AT_LEAST,
    AT_MOST,
    EQUAL,
    INFEASIBLE,
    Program,
    Row,
    Solution,
    Variable,
    solve,
)

MOST_NODES: Final = 64
PEAK: Final = "peak"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One computation: its time, its output's bytes, and the nodes whose outputs it reads."""

    name: str
    seconds: float
    num_bytes: float
    reads: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes in an order of execution; `fixed_bytes` (inputs, weights) are there throughout."""

    nodes: tuple[Node, ...]
    fixed_bytes: float = 0.0

    def __post_init__(self) -> None:
        if not self.nodes:
            raise InputError("the graph has no nodes; give at least one")
        if len(self.nodes) > MOST_NODES:
            raise InputError(
                f"{len(self.nodes)} nodes are more than {MOST_NODES}; merge those that run together"
            )
        seen: set[str] = set()
        for node in self.nodes:
            if node.name in seen:
                raise InputError(f"node '{node.name}' occurs twice; rename one")
            for read in node.reads:
                if read not in seen:
                    raise InputError(
                        f"node '{node.name}' reads '{read}', which no earlier node makes; "
                        "put nodes in an order of execution"
                    )
            if not (node.seconds >= 0 and node.num_bytes >= 0):
                raise InputError(f"node '{node.name}' has a negative time or size; mend it")
            seen.add(node.name)

    @cached_property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """Positions that each node reads."""
        at = {node.name: i for i, node in enumerate(self.nodes)}
        return tuple(tuple(sorted({at[name] for name in node.reads})) for node in self.nodes)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Positions that read each node."""
        return tuple(
            tuple(j for j, reads in enumerate(self.reads) if i in reads)
            for i in range(len(self.nodes))
        )

    @property
    def seconds(self) -> float:
        """Every node once."""
        return sum(node.seconds for node in self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What runs in each stage and what is kept into it; nodes by position."""

    graph: Graph
    computed: tuple[frozenset[int], ...]
    kept: tuple[frozenset[int], ...]

    @property
    def seconds(self) -> float:
        """All computations."""
        return sum(self.graph.nodes[i].seconds for stage in self.computed for i in stage)

    @property
    def recomputed(self) -> dict[str, int]:
        """How often nodes are computed again."""
        counts = {
            node.name: sum(i in stage for stage in self.computed) - 1
            for i, node in enumerate(self.graph.nodes)
        }
        return {name: count for name, count in counts.items() if count}

    @property
    def peak_bytes(self) -> float:
        """Most bytes held, from a replay that frees an output after its last use."""
        return max(size for _, _, size in self.steps())

    def steps(self) -> Iterable[tuple[int, str, float]]:
        """Stage, node and bytes held while it runs, in order; refuses to read what is not there."""
        size = [node.num_bytes for node in self.graph.nodes]
        held: set[int] = set()
        for t, stage in enumerate(self.computed):
            held &= set(self.kept[t])
            after = self.kept[t + 1] if t + 1 < len(self.kept) else frozenset()
            for k in sorted(stage):
                missing = [i for i in self.graph.reads[k] if i not in held]
                if missing:
                    name = self.graph.nodes[k].name
                    raise AssertionError(f"{name} reads {self.graph.nodes[missing[0]].name}")
                held.add(k)
                yield (
                    t,
                    self.graph.nodes[k].name,
                    self.graph.fixed_bytes + sum(size[i] for i in held),
                )
                held = {
                    i for i in held
                    if i in after or any(j in stage and j > k for j in self.graph.readers[i])
                }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RematerialisePlan:
    """The schedule and what is proven of it; `lower_s` bounds every schedule's time."""

    schedule: Schedule
    budget_bytes: float
    solution: Solution
    lower_s: float

    @property
    def overhead_frac(self) -> float:
        """Time beyond computing every node once, over that."""
        base = self.schedule.graph.seconds
        return self.schedule.seconds / base - 1 if base else 0.0


def plan(
    graph: Graph,
    budget_bytes: float,
    *,
    engine: str | None = None,
    time_limit_s: float = 60.0,
    gap_frac: float = 0.0,
) -> RematerialisePlan:
    """The cheapest schedule within the budget; raises where none fits, with the least that does."""
    _, cost = _units(graph)
    found = solve(
        program(graph, budget_bytes), engine=engine, time_limit_s=time_limit_s,
        gap_frac=gap_frac, explain=False,
    )  # fmt: skip
    if found.status == INFEASIBLE:
        least, proven = least_budget(graph, engine=engine, time_limit_s=time_limit_s)
        word = "the least that works is" if proven else "enough would be"
        raise InfeasibleError(f"no schedule fits {_size(budget_bytes)}; {word} {_size(least)}")
    if not found.has_point:
        raise InfeasibleError(
            f"no schedule was found within {time_limit_s:g} s ({found.reason}); give more time "
            "or a larger budget"
        )
    return RematerialisePlan(
        schedule=_schedule(graph, found), budget_bytes=budget_bytes, solution=found,
        lower_s=found.bound * cost,
    )  # fmt: skip


def least_budget(
    graph: Graph, *, engine: str | None = None, time_limit_s: float = 60.0
) -> tuple[float, bool]:
    """The smallest peak of any schedule (or of the best one found), and whether that is proven."""
    found = solve(program(graph, None), engine=engine, time_limit_s=time_limit_s, explain=False)
    if not found.has_point:
        everything = graph.fixed_bytes + sum(node.num_bytes for node in graph.nodes)
        return everything, False
    return _schedule(graph, found).peak_bytes, found.status == "optimal"


def _units(graph: Graph) -> tuple[float, float]:
    """What sizes and times are counted in."""
    sizes, times = ([getattr(n, key) for n in graph.nodes] for key in ("num_bytes", "seconds"))
    return max(sizes) or 1.0, max(times) or 1.0


def _schedule(graph: Graph, found: Solution) -> Schedule:
    num = len(graph.nodes)
    return Schedule(
        graph=graph,
        computed=tuple(_chosen(found, "R", t, range(t + 1)) for t in range(num)),
        kept=tuple(_chosen(found, "S", t, range(t)) for t in range(num)),
    )


def _chosen(found: Solution, letter: str, t: int, nodes: Iterable[int]) -> frozenset[int]:
    return frozenset(i for i in nodes if found.values.get(f"{letter}[{t},{i}]", 0.0) > 0.5)


# ---- the program ---------------------------------------------------------------------------------


def program(graph: Graph, budget_bytes: float | None) -> Program:
    """(1) to (6); without a budget the peak is minimised instead of the time."""
    size, cost = _units(graph)
    num = len(graph.nodes)
    build = _Builder(graph, [node.num_bytes / size for node in graph.nodes])
    room = (sum(build.sizes) if budget_bytes is None
            else (budget_bytes - graph.fixed_bytes) / size)  # fmt: skip
    variables, rows = build.choices(), build.reads() + build.keeps()
    for t in range(num):
        variables += [Variable(f"U[{t},{k}]", 0.0, max(room, 0.0)) for k in range(t + 1)]
        rows += [row for k in range(t + 1) for row in build.memory(t, k)]
    if room < 0:
        rows.append(Row("budget", {"R[0,0]": 1.0}, AT_MOST, 0.0))
    objective = {
        f"R[{t},{i}]": node.seconds / cost
        for t in range(num) for i, node in enumerate(graph.nodes[: t + 1])
    }  # fmt: skip
    if budget_bytes is None:
        variables.append(Variable(PEAK))
        rows += [
            Row(f"peak[{t},{k}]", {f"U[{t},{k}]": 1.0, PEAK: -1.0}, AT_MOST, 0.0)
            for t in range(num) for k in range(t + 1)
        ]  # fmt: skip
        objective = {PEAK: 1.0}
    return Program(
        name="rematerialise", variables=tuple(variables), rows=tuple(rows), objective=objective
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Builder:
    graph: Graph
    sizes: Sequence[float]

    def choices(self) -> list[Variable]:
        """R, S and F; R_tt is fixed."""
        made = []
        for t in range(len(self.sizes)):
            for i in range(t + 1):
                made.append(Variable(f"R[{t},{i}]", 1.0 if i == t else 0.0, 1.0, True))
            made += [Variable(f"S[{t},{i}]", 0.0, 1.0, True) for i in range(t)]
            made += [
                Variable(f"F[{t},{i},{k}]", 0.0, 1.0, True)
                for k in range(t + 1) for i in (*self.graph.reads[k], k)
            ]  # fmt: skip
        return made

    def reads(self) -> list[Row]:
        """(2)."""
        return [
            Row(f"reads[{t},{i},{j}]", self._sum({f"R[{t},{j}]": 1.0, f"R[{t},{i}]": -1.0},
                t, i, -1.0), AT_MOST, 0.0)
            for t in range(len(self.sizes)) for j in range(t + 1) for i in self.graph.reads[j]
        ]  # fmt: skip

    def keeps(self) -> list[Row]:
        """(3)."""
        return [
            Row(f"keeps[{t},{i}]", self._sum({f"S[{t},{i}]": 1.0, f"R[{t - 1},{i}]": -1.0},
                t - 1, i, -1.0), AT_MOST, 0.0)
            for t in range(1, len(self.sizes)) for i in range(t)
        ]  # fmt: skip

    def memory(self, t: int, k: int) -> list[Row]:
        """(4) or (5) and, for what k may free, (6)."""
        used = {f"U[{t},{k}]": 1.0, f"R[{t},{k}]": -self.sizes[k]}
        if k == 0:
            used |= {f"S[{t},{i}]": -self.sizes[i] for i in range(t)}
        else:
            used[f"U[{t},{k - 1}]"] = -1.0
            freed = (*self.graph.reads[k - 1], k - 1)
            used |= {f"F[{t},{i},{k - 1}]": self.sizes[i] for i in freed}
        rows = [Row(f"memory[{t},{k}]", used, EQUAL, 0.0)]
        for i in (*self.graph.reads[k], k):
            rows += self._free(t, i, k)
        return rows

    def _free(self, t: int, i: int, k: int) -> list[Row]:
        reasons = {f"R[{t},{k}]": -1.0}
        if t + 1 < len(self.sizes):
            reasons[f"S[{t + 1},{i}]"] = 1.0
        later = [j for j in self.graph.readers[i] if k < j <= t]
        reasons |= {f"R[{t},{j}]": 1.0 for j in later}
        most, freed = float(len(reasons)), f"F[{t},{i},{k}]"
        return [
            Row(f"may free[{t},{i},{k}]", {**reasons, freed: most}, AT_MOST, most - 1.0),
            Row(f"frees[{t},{i},{k}]", {**reasons, freed: 1.0}, AT_LEAST, 0.0),
        ]

    def _sum(self, terms: dict[str, float], t: int, i: int, value: float) -> dict[str, float]:
        """The terms and S_ti, which exists for i < t only."""
        return {**terms, f"S[{t},{i}]": value} if i < t else terms


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.4g} GiB" if num_bytes >= GIB / 1024 else f"{num_bytes:.6g} bytes"

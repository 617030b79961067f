"""What a gigabyte, a faster link or more host memory is worth: duals, and what re-planning finds.

For one mesh, n_ij layers of stage i in mode j, counted, not named (layers are alike):

    min  (m - 1 / v) T + (1 / v) sum_i t_i + constant,    t_i = sum_j n_ij t_j + e_i
    time i      t_i <= T
    memory i    sum_j n_ij (state + f_i kept_j) + ends_i <= M
    host i      f_i sum_j n_ij host_j <= H
    link i      sum_j n_ij (host_j - B forward) <= 0
    layers k    sum_ij n_ij = layers of kind k

The duals of the linear relaxation price its rows; a bandwidth b is in coefficients, which are
linear in 1 / b, so that its price is the envelope gradient at the relaxation's solution

    d obj / d(1 / b) = sum_ij x_ij (1 / v + y_i) dt_j / d(1 / b) + constants,

y_i >= 0 the dual of row time i. Memory's dual says little of whole layers: one more gigabyte may
change nothing or let another mesh in. So `memory_curve` plans anew for every budget asked for, and
with the mesh of the best plan held; both fall in steps. Bandwidths are priced for the whole layout
as well (`step_s`): that price moves with the plan found, whatever the relaxation.

Left out of the relaxation: what one layer needs at once while it is redone, what follows the
pipeline, and that stages of an interleaved schedule hold multiples of v layers.

    Implemented in: `mesh_program` (the rows), `prices_of` (duals and gradients), `memory_curve`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hwmodels.cluster import Cluster
from simulator.planners.figures import Question, figures_of
from simulator.planners.program import AT_MOST, EQUAL, OPTIMAL, Program, Row, Solution, Variable
from simulator.planners.program import solve as solve_program
from simulator.planners.stages import EndPart, StageProblem, best_layout
from simulator.planners.training import Answer, Found, Search, candidate_of
from simulator.staged import StageLayers, apart, stage_costs, staged_step
from workloads.numeric import Array
from workloads.plan import Plan

GIGA: Final = 1e9
STEP: Final = 1e-3
"""Relative change of 1 / bandwidth that coefficients, linear in it, are differenced over."""
SAME: Final = 1e-12
"""Relative difference up to which two steps are one."""
FASTER: Final = 1.01
"""The change of a bandwidth that is told in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a resource is worth at the best plan, in seconds of a step saved.

    `dual_s` by the linear relaxation of the best plan's mesh, `step_s` of the plan itself; per
    GB, or for a bandwidth 1 % higher. None where there is no such figure.
    """

    resource: str
    unit: str
    dual_s: float | None
    step_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A budget, the best step within it, and that of the best plan's own mesh (None: none fits).

    The step is the same from `from_bytes` on, what its plan needs: the edge of the stair.
    """

    budget_bytes: float
    seconds: float | None
    same_mesh_s: float | None
    plan: Plan | None
    from_bytes: float | None


def mesh_program(problem: StageProblem, name: str = "mesh") -> Program:
    """The linear relaxation of one mesh, memory in GB."""
    variables, rows = [Variable("T")], []
    objective = {"T": problem.slope}
    ones = np.array([0.0, 1.0])
    base = float(problem.states(ones[:1], ones[:1])[0])
    of_layers: list[dict[str, float]] = [{} for _ in problem.kinds]
    constant = problem.fixed_s
    for i, flight in enumerate(problem.in_flight):
        ends = list(problem.ends(i))
        time = {"T": -1.0}
        memory: dict[str, float] = {}
        host: dict[str, float] = {}
        link: dict[str, float] = {}
        for k, kind in enumerate(problem.kinds):
            held = np.array([kind.dense]), np.array([kind.experts])
            state = float(problem.states(*held)[0]) - base
            for mode in kind.modes:
                x = f"n[{i},{kind.name},{mode.name}]"
                variables.append(Variable(x))
                of_layers[k][x] = 1.0
                time[x] = mode.seconds
                objective[x] = mode.seconds / problem.num_chunks
                memory[x] = (state + flight * mode.kept_bytes) / GIGA
                if mode.host_bytes:
                    host[x] = flight * mode.host_bytes / GIGA
                link[x] = (
                    mode.host_bytes - problem.limits.host_bytes_per_s * kind.forward_s
                ) / GIGA
        end_s = sum(e.seconds for e in ends)
        constant += end_s / problem.num_chunks
        rows.append(Row(f"time {i}", time, AT_MOST, -end_s))
        own = sum(float(problem.states(*_parameters(e))[0]) - base for e in ends)
        fixed = base + own + problem.fixed_bytes
        fixed += sum(e.fixed_bytes + flight * e.kept_bytes for e in ends)
        room = (problem.limits.budget_bytes - fixed) / GIGA
        rows.append(Row(f"memory {i}", memory, AT_MOST, room))
        if host:
            rows.append(Row(f"host {i}", host, AT_MOST, problem.limits.host_bytes / GIGA))
            rows.append(Row(f"link {i}", link, AT_MOST, 0.0))
    for k, (kind, terms) in enumerate(zip(problem.kinds, of_layers, strict=True)):
        rows.append(Row(f"layers {kind.name}", terms, EQUAL, float(problem.prefix[-1][k])))
    return Program(
        name=name, variables=tuple(variables), rows=tuple(rows), objective=objective,
        constant=constant,
    )  # fmt: skip


def _parameters(end: EndPart) -> tuple[Array, Array]:
    return np.array([float(end.dense)]), np.array([float(end.experts)])


def prices_of(found: Found) -> tuple[Price, ...]:
    """Prices at the best plan: device memory, host memory where it is used, every link level."""
    group, q = found.figures, found.figures.question
    problem = group.problem(found.index)
    solution = solve_program(mesh_program(problem))
    duals = solution.duals if solution.status == OPTIMAL and solution.duals else None
    prices = [
        Price(resource="device memory", unit="s per GB", dual_s=_rows(duals, "memory"), step_s=None)
    ]
    if any(name.startswith("host") for name in duals or {}):
        host = _rows(duals, "host")
        prices.append(Price(resource="host memory", unit="s per GB", dual_s=host, step_s=None))
    for level in levels_of(q.on):
        rate = 1 - 1 / FASTER
        dual = None
        if duals is not None:
            dual = rate * relaxed_gradient(found, level, solution)
        prices.append(
            Price(
                resource=level, unit="s for 1 % more bandwidth", dual_s=dual,
                step_s=rate * step_gradient(found, level),
            )
        )  # fmt: skip
    return tuple(prices)


def _rows(duals: Mapping[str, float] | None, start: str) -> float | None:
    """Seconds saved if the right sides of all such rows rise by one."""
    if duals is None:
        return None
    return -sum(value for name, value in duals.items() if name.startswith(start))


def levels_of(on: Cluster) -> list[str]:
    """Link levels that this many nodes use."""
    used = on.levels if on.num_nodes > 1 else on.levels[:1]
    return [level.name for level in used]


def slower(on: Cluster, level: str, times: float) -> Cluster:
    """The cluster with 1 / bandwidth of a level multiplied."""
    levels = tuple(
        replace(x, bytes_per_s=x.bytes_per_s / times) if x.name == level else x for x in on.levels
    )
    return replace(on, levels=levels)


def step_gradient(found: Found, level: str) -> float:
    """Seconds of the best plan's step that are due to a link level: b^-1 d step / d(b^-1)."""
    q, plan = found.figures.question, found.figures.plan(found.index)
    low, high = (
        _step_s(q, plan, found.stages, slower(q.on, level, 1 + sign * STEP)) for sign in (-1, 1)
    )
    return (high - low) / (2 * STEP)


def _step_s(q: Question, plan: Plan, stages: Sequence[StageLayers], on: Cluster) -> float:
    costs = stage_costs(q.step, plan=plan, stages=stages, on=on, recipe=q.recipe, stack=q.stack)
    step = staged_step(q.step, costs, plan=plan, on=on, recipe=q.recipe, stack=q.stack)
    return float(step.seconds)


def relaxed_gradient(found: Found, level: str, solution: Solution) -> float:
    """The same of the relaxation: d objective along the coefficients, at its point and duals."""
    low, high = (problem_on(found, level, 1 + sign * STEP) for sign in (-1, 1))
    before, after = mesh_program(low), mesh_program(high)
    assert solution.duals is not None
    total = after.constant - before.constant
    for name, value in after.objective.items():
        total += solution.values[name] * (value - before.objective[name])
    for one, other in zip(before.rows, after.rows, strict=True):
        dual = solution.duals[one.name]
        moved = sum(solution.values[x] * (value - one.terms[x]) for x, value in other.terms.items())
        total -= dual * (moved - (other.right - one.right))
    return total / (2 * STEP)


def problem_on(found: Found, level: str, times: float) -> StageProblem:
    """The best plan's mesh on a cluster with that level slower."""
    group, q = found.figures, found.figures.question
    plan = group.plan(found.index)
    one = Plan(
        **{name: np.array([float(getattr(plan, name))]) for name in plan.__dataclass_fields__}
    )
    other = replace(q, on=slower(q.on, level, times))
    mixed = 0 < q.step.config.num_linear_layers < q.step.config.num_layers
    figures = figures_of(other, one, by_attention=apart(plan) if mixed else True)
    return figures.problem(0)


CURVE_STEPS: Final = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
"""Budgets of the memory curve, in units of 1e9 bytes beside the one asked for."""


def curve_around(answer: Answer, steps: Sequence[float] = CURVE_STEPS) -> tuple[CurvePoint, ...]:
    """The memory curve at budgets around the one asked for, within what the device has."""
    limits = answer.asked.question.limits
    capacity = answer.asked.question.on.device.hbm.capacity_bytes
    budgets = [limits.budget_bytes + GIGA * more for more in steps]
    return memory_curve(answer, [b for b in budgets if 0 < b <= capacity])


def memory_curve(answer: Answer, budgets: Sequence[float]) -> tuple[CurvePoint, ...]:
    """The best step within each budget, planned anew, and that of the best plan's mesh.

    A larger budget is never worse, so the answer for one budget bounds that for the next.
    """
    asked, best = replace(answer.asked, num_plans=1), answer.best
    scale = answer.scale
    points: list[CurvePoint] = []
    last: Found | None = None
    needed: float | None = None
    for budget in sorted(budgets):
        limits = replace(asked.question.limits, budget_bytes=budget)
        own = best_layout(best.figures.problem(best.index, limits))
        known = [x.seconds for x in (last, own) if x is not None]
        search = Search(groups=answer.groups, asked=asked)
        search.run(limits, below_s=min(known) * (1 + SAME) if known else math.inf)
        if search.found:
            last = search.ranked[0]
            needed = float(candidate_of(last).memory.total)
        points.append(
            CurvePoint(
                budget_bytes=budget,
                seconds=scale * last.seconds if last else None,
                same_mesh_s=scale * own.seconds if own else None,
                plan=last.figures.plan(last.index) if last else None,
                from_bytes=needed,
            )
        )
    return tuple(points)

"""The fastest plan for training, uneven stages and modes of single layers included, and proven.

Space: the meshes and schedules of `parallelism`, with two more freedoms,

    stages     any split of the layers over the stages, into multiples of v          (pp v <= L)
    modes      every layer keeps, recomputes or offloads its activations (`modes`)

so that interleaving needs v | L only. Searched best-first: all meshes are priced and bounded at
once (`figures`), then solved in the order of their bounds (`stages`) until the next bound is not
below the best step found. What was not solved is not faster: the gap is 0. A time limit or a wanted
gap ends the search before; then the least bound left says how far the answer may be off.

Where nothing fits, three relaxations are looked for: the smallest budget with which some plan fits,
the first doubling of the nodes, and each pin alone.

    Implemented in: `training_space`, `plan_training` (search), `_Relaxed` (infeasibility).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.errors import InfeasibleError, InputError
from simulator.layer_modes import FULL, MODES, NONE, OFFLOAD, OFFLOAD_FULL, SELECTIVE
from simulator.planners.figures import Figures, Question, figures_of, rank_limits
from simulator.planners.modes import Limits
from simulator.planners.parallelism import (
    COLUMNS,
    DEFAULT_HBM_FRAC,
    FEASIBLE,
    MAX_INTERLEAVE,
    MAX_MICRO_BATCH,
    OPTIMAL,
    Candidate,
    PlanChoice,
    check_against_rules,
    divisors,
    meshes,
    narrowed,
    plan_parallelism,
    select,
)
from simulator.planners.sequence_splits import ANY, Splits
from simulator.planners.stages import SLACK, Layout, best_layout
from simulator.recipe import RECIPES, Recipe
from simulator.stack import OnDevice
from simulator.staged import StageLayers, stage_costs, stage_layers, staged_memory, staged_step
from workloads.models.transformer import TrainStep
from workloads.plan import Plan, Recompute

PINNED_MODES: Final[Mapping[int, tuple[str, ...]]] = {
    Recompute.NONE: (NONE, OFFLOAD),
    Recompute.SELECTIVE: (SELECTIVE,),
    Recompute.FULL: (FULL, OFFLOAD_FULL),
}
"""Modes that a pinned recomputation leaves."""
USUAL: Final = Plan()
FACTORS: Final = (2, 4, 8, 16, 32, 64)
"""Times the nodes that are tried where nothing fits."""
BUDGET_STEP_BYTES: Final = 2**24
"""How closely the smallest budget is told."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A search as it was asked."""

    question: Question
    pins: Mapping[str, int]
    splits: Splits = ANY
    num_plans: int = 1
    time_limit_s: float = math.inf
    gap_frac: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """One mesh solved: where its figures are, and its fastest layout."""

    figures: Figures
    index: int
    layout: Layout

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.layout.seconds

    @property
    def stages(self) -> tuple[StageLayers, ...]:
        """Layers by kind and mode, stage by stage."""
        problem = self.figures.problem(self.index)  # modes do not depend on the budget
        return tuple(
            stage_layers(
                {
                    kind.name: {m.name: n for m, n in zip(kind.modes, row, strict=True)}
                    for kind, row in zip(problem.kinds, choice.counts, strict=True)
                }
            )
            for choice in self.layout.choices
        )


@dataclass(kw_only=True)
class Search:
    """Meshes in the order of their bounds; the best of every mesh so far."""

    groups: Sequence[Figures]
    asked: Asked
    found: dict[tuple[float, ...], Found] = field(default_factory=dict)
    num_solved: int = 0
    left_s: float = math.inf

    def run(self, limits: Limits | None = None, below_s: float = math.inf) -> None:
        """Solve until no mesh that is left can be among the plans asked for."""
        start = time.perf_counter()
        bounds = [group.bounds for group in self.groups]
        owner = np.concatenate([np.full(len(b), g) for g, b in enumerate(bounds)])
        inside = np.concatenate([np.arange(len(b)) for b in bounds])
        bound = np.concatenate(bounds)
        needs = np.concatenate([group.least_bytes for group in self.groups])
        budget = (limits or self.asked.question.limits).budget_bytes * (1 + SLACK)
        order = np.argsort(bound, kind="stable")
        for at in order[needs[order] <= budget]:
            cut = min(self._cut(), below_s)
            late = time.perf_counter() - start > self.asked.time_limit_s
            if bound[at] >= cut or (late and self.found) or self._near(float(bound[at])):
                self.left_s = float(bound[at])
                return
            self.num_solved += 1
            self._solve(self.groups[int(owner[at])], int(inside[at]), limits, cut)

    def _cut(self) -> float:
        """Steps of at least that time are not asked for."""
        seconds = sorted(f.seconds for f in self.found.values())
        return (
            seconds[self.asked.num_plans - 1]
            if len(seconds) >= self.asked.num_plans
            else (math.inf)
        )

    def _near(self, bound_s: float) -> bool:
        """Is the wanted gap reached?"""
        if not self.asked.gap_frac or not self.found:
            return False
        best = min(f.seconds for f in self.found.values())
        return best - bound_s <= self.asked.gap_frac * best

    def _solve(self, group: Figures, index: int, limits: Limits | None, cut: float) -> None:
        plan = group.plan(index)
        key = tuple(float(getattr(plan, n)) for n in (*COLUMNS[:6], "sequence", "ulysses"))
        if key in self.found:
            cut = min(cut, self.found[key].seconds)
        layout = best_layout(group.problem(index, limits), cut)
        if layout is not None:
            self.found[key] = Found(figures=group, index=index, layout=layout)

    @property
    def ranked(self) -> list[Found]:
        """The best of every mesh, fastest first."""
        return sorted(self.found.values(), key=lambda f: f.seconds)

    @property
    def gap_frac(self) -> float:
        """How much faster a plan that was not solved may be."""
        best = self.ranked[0].seconds
        return max(best - self.left_s, 0.0) / best


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A search with all it found: what prices and curves are made from."""

    asked: Asked
    groups: Sequence[Figures]
    best: Found
    choice: PlanChoice

    @property
    def scale(self) -> float:
        """Seconds of a step over those of a stage problem: waiting for the slowest node."""
        return float(self.choice.best.step.seconds) / self.best.seconds


def training_space(step: TrainStep, *, on: Cluster) -> Plan:
    """Every mesh with every micro-batch, interleave and ZeRO stage; nothing recomputed."""
    len_seq = int(step.len_seq)
    rows = [
        row
        for mesh in meshes(step.config, on=on, len_new=len_seq)
        for row in _schedules(mesh, step)
    ]
    if not rows:
        raise InfeasibleError(
            f"no plan divides global batch {int(step.global_batch)} and sequence {len_seq} over "
            f"{on.num_accelerators} accelerators; choose a batch with more divisors, or another "
            "number of nodes"
        )
    searched = dict(zip(COLUMNS, np.asarray(rows, dtype=np.float64).T, strict=True))
    usual = {f.name: np.full(len(rows), float(getattr(USUAL, f.name))) for f in fields(Plan)}
    return Plan(**usual | searched)


def _schedules(mesh: tuple[int, ...], step: TrainStep) -> Iterator[tuple[int, ...]]:
    dp, _, pp, cp = mesh[:4]
    batch, layers = int(step.global_batch), step.config.num_layers
    if batch % dp:
        return
    zero_stages = (0,) if dp * cp == 1 else (0, 1) if pp > 1 else (0, 1, 2, 3)
    for micro in (b for b in divisors(batch // dp) if b <= MAX_MICRO_BATCH):
        chunks = [1]
        if pp > 1 and batch // (dp * micro) % pp == 0:
            chunks += [
                v for v in range(2, MAX_INTERLEAVE + 1) if layers % v == 0 and pp * v <= layers
            ]
        for v in chunks:
            for zero in zero_stages:
                yield (*mesh, micro, v, int(Recompute.NONE), zero)


def plan_training(step: TrainStep, *, on: Cluster, **how: Any) -> PlanChoice:
    """The plans of `search_training`, which says what may be asked."""
    return search_training(step, on=on, **how).choice


def search_training(
    step: TrainStep,
    *,
    on: Cluster,
    recipe: Recipe = RECIPES["bf16"],
    hbm_frac: float = DEFAULT_HBM_FRAC,
    budget_bytes: float | None = None,
    host_bytes_per_node: float = 0.0,
    num_runners_up: int = 4,
    pins: Mapping[str, int] | None = None,
    stack: OnDevice | None = None,
    splits: Splits = ANY,
    time_limit_s: float = math.inf,
    gap_frac: float = 0.0,
) -> Answer:
    """The fastest plan that fits, and the best of the next meshes; proven as `status` says.

    `budget_bytes` of device memory instead of a share of it; `host_bytes_per_node` of host memory
    that activations may be offloaded to. The other arguments are `plan_parallelism`'s, whose space
    is enumerated beside for comparison.
    """
    if not 0 < hbm_frac <= 1:
        raise InputError(f"HBM fraction {hbm_frac:g} must lie in (0, 1]")
    capacity = on.device.hbm.capacity_bytes
    budget = capacity * hbm_frac if budget_bytes is None else budget_bytes
    if not 0 < budget <= capacity:
        raise InputError(
            f"a budget of {budget / 1e9:g} GB is not within the {capacity / 1e9:.4g} GB of "
            f"{on.device.id}; give less"
        )
    asked = asked_of(
        step, on, recipe, rank_limits(budget, on, host_bytes_per_node), stack, pins or {}, splits,
        num_plans=1 + num_runners_up, time_limit_s=time_limit_s, gap_frac=gap_frac,
    )  # fmt: skip
    start = time.process_time()
    search = Search(groups=groups_of(asked), asked=asked)
    search.run()
    solve_s = time.process_time() - start
    if not search.found:
        raise InfeasibleError(_Relaxed(asked, search.groups).message())
    gap = search.gap_frac
    chosen = [candidate_of(f) for f in search.ranked[: 1 + num_runners_up]]
    even = _even(asked, hbm_frac if budget_bytes is None else budget / capacity, chosen[0])
    choice = replace(
        even,
        budget_bytes=budget,
        best=chosen[0],
        runners_up=tuple(chosen[1:]),
        num_evaluated=sum(g.size for g in search.groups),
        gap_frac=gap,
        status=OPTIMAL if gap == 0 else FEASIBLE,
        solve_s=solve_s,
    )
    return Answer(asked=asked, groups=search.groups, best=search.ranked[0], choice=choice)


def asked_of(
    step: TrainStep, on: Cluster, recipe: Recipe, limits: Limits, stack: OnDevice | None,
    pins: Mapping[str, int], splits: Splits, **more: float,
) -> Asked:  # fmt: skip
    """The search for a step, with the modes that a pinned recomputation leaves."""
    modes = PINNED_MODES[pins["recompute"]] if pins.get("recompute") in PINNED_MODES else MODES
    question = Question(step=step, on=on, recipe=recipe, limits=limits, stack=stack, modes=modes)
    own = {k: v for k, v in pins.items() if k != "recompute" or v not in PINNED_MODES}
    return Asked(question=question, pins=own, splits=splits, **more)  # type: ignore[arg-type]


def groups_of(asked: Asked) -> list[Figures]:
    """The priced space: plans that share sequences apart where kinds of attention are mixed."""
    q = asked.question
    check_against_rules(asked.pins, q.step, q.on, even=False)
    space = training_space(q.step, on=q.on)
    space = narrowed(space, q.step, asked.pins, asked.splits, on=q.on)
    cfg = q.step.config
    if not 0 < cfg.num_linear_layers < cfg.num_layers:
        return [figures_of(q, space)]
    together = np.asarray(space.cp) > 1
    parts = [np.flatnonzero(~together), np.flatnonzero(together)]
    return [
        figures_of(q, select(space, part), by_attention=not shared)
        for shared, part in enumerate(parts)
        if part.size
    ]


def candidate_of(found: Found) -> Candidate:
    """A solved mesh with its step by piece and its fullest stage."""
    q, plan = found.figures.question, found.figures.plan(found.index)
    stages = found.stages
    costs = stage_costs(q.step, plan=plan, stages=stages, on=q.on, recipe=q.recipe, stack=q.stack)
    modes = {mode for s in stages for mode in s.modes}
    same = Recompute.FULL if modes <= {FULL, OFFLOAD_FULL} else Recompute.NONE
    plan = replace(plan, recompute=int(Recompute.SELECTIVE if modes == {SELECTIVE} else same))
    return Candidate(
        plan=plan,
        step=staged_step(q.step, costs, plan=plan, on=q.on, recipe=q.recipe, stack=q.stack),
        memory=staged_memory(costs),
        stages=stages,
        costs=costs,
    )


def _even(asked: Asked, hbm_frac: float, best: Candidate) -> PlanChoice:
    """All plans with equal stages, for comparison; the best plan alone where none of them fits."""
    q = asked.question
    try:
        return plan_parallelism(
            q.step, on=q.on, recipe=q.recipe, hbm_frac=hbm_frac, num_runners_up=0,
            pins=asked.pins, stack=q.stack, splits=asked.splits,
        )  # fmt: skip
    except (InfeasibleError, InputError):  # pins may suit uneven stages alone
        one = Plan(**{f.name: np.array([float(getattr(best.plan, f.name))]) for f in fields(Plan)})
        return PlanChoice(
            cluster=q.on, recipe=q.recipe, budget_bytes=0.0, best=best, runners_up=(),
            num_evaluated=1, feasible=one, seconds=np.array([float(best.step.seconds)]),
            total_bytes=np.array([float(best.memory.total)]), stack=q.stack,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Way:
    """The mesh that needs least memory, and how much."""

    plan: Plan
    budget_bytes: float


class _Relaxed:
    """What would make an impossible question possible."""

    def __init__(self, asked: Asked, groups: Sequence[Figures]) -> None:
        self.asked, self.groups = asked, groups

    def message(self) -> str:
        """One line: how much is missing, and each relaxation that works alone."""
        q = self.asked.question
        way = leanest(self.groups, q.limits)
        missing = way.budget_bytes - q.limits.budget_bytes
        nodes = self._nodes()
        ways = [f"on {nodes} nodes"] if nodes else []
        if way.budget_bytes <= q.on.device.hbm.capacity_bytes:
            ways.append(f"with {missing / 1e9:.2f} GB more per accelerator")
        ways += [f"with {name} not pinned to {value}" for name, value in self._pins()]
        need = (
            f"no plan of {q.step.config.name} fits {q.on.num_accelerators} x {q.on.device.id}: the "
            f"leanest ({way.plan}) needs {way.budget_bytes / 2**30:.1f} GiB per accelerator of a "
            f"budget of {q.limits.budget_bytes / 2**30:.1f} GiB"
        )
        otherwise = "shorten the sequence, shrink the batch or take a larger device"
        return f"{need}; it fits {', or '.join(ways)}" if ways else f"{need}; {otherwise}"

    def _nodes(self) -> int | None:
        q = self.asked.question
        for factor in FACTORS:
            if q.on.max_accelerators and q.on.num_accelerators * factor > q.on.max_accelerators:
                return None
            larger = replace(q.on, num_nodes=q.on.num_nodes * factor)
            if self._fits(replace(self.asked, question=replace(q, on=larger))):
                return larger.num_nodes
        return None

    def _pins(self) -> Iterator[tuple[str, int]]:
        q, pins = self.asked.question, dict(self.asked.pins)
        if q.modes != MODES:
            free = replace(self.asked, question=replace(q, modes=MODES))
            if self._fits(free):
                value = next(k for k, own in PINNED_MODES.items() if own == q.modes)
                yield "recompute", value
        for name, value in pins.items():
            rest = {k: v for k, v in pins.items() if k != name}
            if self._fits(replace(self.asked, pins=rest)):
                yield name, value

    def _fits(self, asked: Asked) -> bool:
        try:
            groups = groups_of(asked)
        except (InfeasibleError, InputError):  # pins may suit the cluster as it is alone
            return False
        return _any_fits(groups, asked.question.limits)


def _needs(groups: Sequence[Figures]) -> Iterator[tuple[float, Figures, int]]:
    """A bound of the memory that a mesh needs, least first."""
    found = [
        (float(need), g, i)
        for g, group in enumerate(groups)
        for i, need in enumerate(group.least_bytes)
    ]
    for need, g, i in sorted(found):
        yield need, groups[g], i


def _any_fits(groups: Sequence[Figures], limits: Limits) -> bool:
    for need, group, index in _needs(groups):
        if need > limits.budget_bytes:
            return False
        if best_layout(group.problem(index)) is not None:
            return True
    return False


def leanest(groups: Sequence[Figures], limits: Limits) -> _Way:
    """The smallest budget with which some mesh fits, to `BUDGET_STEP_BYTES`."""
    best: _Way | None = None
    for need, group, index in _needs(groups):
        if best is not None and need > best.budget_bytes - BUDGET_STEP_BYTES:
            break
        low, high = need, best.budget_bytes - BUDGET_STEP_BYTES if best else math.inf
        if not math.isfinite(high):
            high = max(need, 1.0)
            while _fits_in(group, index, limits, high) is False:
                low, high = high, 2 * high
        elif not _fits_in(group, index, limits, high):
            continue
        while high - low > BUDGET_STEP_BYTES:
            middle = (low + high) / 2
            if _fits_in(group, index, limits, middle):
                high = middle
            else:
                low = middle
        best = _Way(plan=group.plan(index), budget_bytes=high)
    assert best is not None
    return best


def _fits_in(group: Figures, index: int, limits: Limits, budget: float) -> bool:
    own = replace(limits, budget_bytes=budget)
    return best_layout(group.problem(index, own)) is not None

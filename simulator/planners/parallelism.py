"""Which plan trains or serves a model fastest: every plan of a stated space, evaluated at once.

Space: all (dp, tp, pp, cp, ep, etp, micro-batch, interleave, recompute, ZeRO stage) with

    dp tp pp cp = number of accelerators                                                   (1)
    tp divides the query heads and the accelerators of one innermost link group            (2)
    pp <= L; interleave 1 < v <= 8 needs pp > 1, pp v | L and pp | m                        (3)
    cp is a power of two; 2 cp divides the new tokens of a sequence (zigzag); sequences    (4)
    are split as asked, in every way that the model allows (`sequence_splits`)
    ep divides the experts and dp cp; or, unsplit across tp > 1, dp cp tp (etp = 1)        (5)
    training: dp micro-batch | global batch (m is whole), micro-batch <= 16                (6)
    serving: dp pp | batch, one slot of sequences per replica and stage; v = 1, ZeRO 0     (7)
    ZeRO 2 and 3 only without a pipeline: a stage would exchange for every micro-batch     (8)
    the order of the axes over the links: every useful one that differs (`axis_orders`)    (9)

minimise the step's seconds subject to total bytes <= budget. The space is enumerated, so its best
is proven and `gap_frac` is 0. Ties go to the plan with the smaller `upper_s`, then to the simpler
one. Selective recomputation drops attention scores, which fused attention never stores: it is not
searched.

    Implemented in: `meshes` (1, 2, 4, 5), `_schedules` (3, 6, 8), `_slots` (7), `narrowed` (4, 9),
    `plan_parallelism` (objective and budget).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.cluster import Cluster
from hwmodels.errors import InfeasibleError, InputError
from simulator.inference import inference_step
from simulator.memory import MemoryEstimate, inference_memory, training_memory
from simulator.pieces import StepEstimate
from simulator.planners.axis_orders import with_orders
from simulator.planners.pin_rules import check_pins
from simulator.planners.sequence_splits import ANY, Splits, pinned_splits, with_splits
from simulator.recipe import RECIPES, Recipe, require_wide
from simulator.stack import OnDevice
from simulator.staged import StageCost, StageLayers
from simulator.step import training_step
from workloads.models.config import TransformerConfig
from workloads.models.transformer import DECODE, Inference, TrainStep
from workloads.numeric import Array
from workloads.plan import Plan, Recompute

Step: TypeAlias = TrainStep | Inference
Mesh: TypeAlias = tuple[int, int, int, int, int, int]

COLUMNS: Final = (
    "dp", "tp", "pp", "cp", "ep", "etp", "micro_batch", "interleave", "recompute", "zero_stage",
)  # fmt: skip
"""The fields of a plan that are searched: a mesh, then its schedule."""

OPTIMAL, FEASIBLE = "optimal", "feasible"
"""What a search proved of its answer."""
MAX_MICRO_BATCH: Final = 16
MAX_INTERLEAVE: Final = 8

DEFAULT_HBM_FRAC: Final = 0.92
"""Share of the device memory a plan may fill: the rest is left to the driver's context, the
communication library's buffers and fragmentation. An assumption, shown with every answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One feasible plan with its step and its memory; `stages` where they are told one by one."""

    plan: Plan
    step: StepEstimate
    memory: MemoryEstimate
    stages: tuple[StageLayers, ...] = ()
    costs: tuple[StageCost, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoice:
    """The best plan, the runners-up (the best of every other mesh), and the whole search.

    `gap_frac` bounds how much faster any plan of the space could be: 0, all were evaluated.
    `feasible`, `seconds` and `total_bytes` hold every plan that fits, fastest first. `stack` is
    the framework whose kernels they were timed with; None on the bound rung. `status` is 'optimal'
    where the gap is proven to be 0, else 'feasible'; `solve_s` are processor seconds.
    """

    cluster: Cluster
    recipe: Recipe
    budget_bytes: float
    best: Candidate
    runners_up: tuple[Candidate, ...]
    num_evaluated: int
    feasible: Plan
    seconds: Array
    total_bytes: Array
    gap_frac: float = 0.0
    stack: OnDevice | None = None
    status: str = OPTIMAL
    solve_s: float = 0.0

    @property
    def plan(self) -> Plan:
        """The best plan."""
        return self.best.plan

    @property
    def num_feasible(self) -> int:
        """Plans that fit the budget."""
        return self.seconds.size

    @property
    def lower_bound_s(self) -> float:
        """No plan of the space has a smaller sum of pieces."""
        return float(self.best.step.seconds) * (1 - self.gap_frac)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluator:
    """How plans of one question are priced."""

    memory: Callable[[Plan], MemoryEstimate]
    step: Callable[[Plan], StepEstimate]

    def candidate(self, plan: Plan) -> Candidate:
        return Candidate(plan=plan, step=self.step(plan), memory=self.memory(plan))


def plan_parallelism(
    step: Step,
    *,
    on: Cluster,
    recipe: Recipe = RECIPES["bf16"],
    hbm_frac: float = DEFAULT_HBM_FRAC,
    num_runners_up: int = 4,
    pins: Mapping[str, int] | None = None,
    stack: OnDevice | None = None,
    splits: Splits = ANY,
) -> PlanChoice:
    """Evaluate the whole space; raise `InfeasibleError` with the way out where nothing fits.

    On the bound rung, or with a `stack` as that framework trains. For serving, `step.batch` is
    the number of sequences on the whole cluster. `pins` keeps only plans with the given field
    values ({'tp': 8}) and may break no rule of the space (`pin_rules`); `splits` are the ways in
    which cp > 1 shares a sequence.
    """
    if not 0 < hbm_frac <= 1:
        raise InputError(f"HBM fraction {hbm_frac:g} must lie in (0, 1]")
    budget = on.device.hbm.capacity_bytes * hbm_frac
    evaluator = _evaluator(step, on, recipe, stack)
    space = _asked(step, on, pins or {}, splits)
    memory = evaluator.memory(space)
    fits = np.flatnonzero(np.asarray(memory.total) <= budget)
    if not fits.size:
        raise InfeasibleError(
            _why_nothing_fits(step, space, memory, budget, on, recipe, pins or {}, splits)
        )
    feasible, total = select(space, fits), np.asarray(memory.total)[fits]
    priced = evaluator.step(feasible)
    order = _ranked(feasible, np.asarray(priced.seconds), np.asarray(priced.upper_s))
    chosen = [
        evaluator.candidate(feasible.at(index))
        for index in _best_of_each_mesh(feasible, order, 1 + num_runners_up)
    ]
    return PlanChoice(
        cluster=on,
        recipe=recipe,
        budget_bytes=budget,
        best=chosen[0],
        runners_up=tuple(chosen[1:]),
        num_evaluated=np.size(memory.total),
        feasible=select(feasible, order),
        seconds=np.asarray(priced.seconds)[order],
        total_bytes=total[order],
        stack=stack,
    )


def _evaluator(step: Step, on: Cluster, recipe: Recipe, stack: OnDevice | None) -> _Evaluator:
    if isinstance(step, TrainStep):
        return _Evaluator(
            memory=lambda plan: training_memory(step, plan=plan, recipe=recipe),
            step=lambda plan: training_step(step, plan=plan, on=on, recipe=recipe, stack=stack),
        )
    if stack is not None:
        raise InputError("a training framework does not serve; leave the stack out")
    require_wide(recipe, step.phase)

    def slot(plan: Plan) -> Inference:
        return replace(step, batch=step.batch / (plan.dp * plan.pp))

    return _Evaluator(
        memory=lambda plan: inference_memory(slot(plan), plan=plan, recipe=recipe),
        step=lambda plan: inference_step(slot(plan), plan=plan, on=on, recipe=recipe),
    )


def plan_space(step: Step, *, on: Cluster) -> Plan:
    """Every plan of the space as one array-valued Plan."""
    len_new = int(step.len_seq if isinstance(step, TrainStep) else step.len_new)
    schedules = _schedules if isinstance(step, TrainStep) else _slots
    rows = [
        row for mesh in meshes(step.config, on=on, len_new=len_new) for row in schedules(mesh, step)
    ]
    if not rows:
        raise InfeasibleError(_why_no_plan(step, on))
    searched = dict(zip(COLUMNS, np.asarray(rows, dtype=np.float64).T, strict=True))
    usual = {f.name: np.full(len(rows), float(getattr(Plan(), f.name))) for f in fields(Plan)}
    return Plan(**usual | searched)


def meshes(cfg: TransformerConfig, *, on: Cluster, len_new: int) -> Iterator[Mesh]:
    """(dp, tp, pp, cp, ep, etp) with dp tp pp cp = the cluster's accelerators."""
    total = on.num_accelerators
    inner = math.gcd(int(min(on.levels[0].size, total)), cfg.split_parts)
    num_experts = cfg.moe.num_experts if cfg.moe else 1
    for tp in (t for t in divisors(total) if inner % t == 0):
        for pp in (p for p in divisors(total // tp) if p <= cfg.num_layers):
            for cp in (c for c in divisors(total // (tp * pp)) if _power_of_two(c)):
                if cp > 1 and (len_new % (2 * cp) or cfg.mixer is not None):
                    continue
                dp = total // (tp * pp * cp)
                for ep in divisors(math.gcd(num_experts, dp * cp)):
                    yield dp, tp, pp, cp, ep, 0
                whole = divisors(math.gcd(num_experts, dp * cp * tp)) if tp > 1 else ()
                for ep in (n for n in whole if n > 1):
                    yield dp, tp, pp, cp, ep, 1


def _schedules(mesh: Mesh, step: Step) -> Iterator[tuple[int, ...]]:
    """Training: the mesh with every micro-batch, interleave, recompute mode and ZeRO stage."""
    assert isinstance(step, TrainStep)
    dp, _, pp, cp, _, _ = mesh
    batch, num_layers = int(step.global_batch), step.config.num_layers
    if batch % dp:
        return
    zero_stages = (0,) if dp * cp == 1 else (0, 1) if pp > 1 else (0, 1, 2, 3)
    modes = (int(Recompute.NONE), int(Recompute.FULL))
    for micro in (b for b in divisors(batch // dp) if b <= MAX_MICRO_BATCH):
        num_micro = batch // (dp * micro)
        chunks = [1]
        if pp > 1 and num_micro % pp == 0:
            chunks += [v for v in range(2, MAX_INTERLEAVE + 1) if num_layers % (pp * v) == 0]
        for v, mode, zero in itertools.product(chunks, modes, zero_stages):
            yield (*mesh, micro, v, mode, zero)


def _slots(mesh: Mesh, step: Step) -> Iterator[tuple[int, ...]]:
    """Serving: the mesh, if the batch fills every slot alike; cp only where a prompt is read."""
    assert isinstance(step, Inference)
    dp, _, pp, cp, _, _ = mesh
    batch = int(step.batch)
    if batch % (dp * pp) or (cp > 1 and step.phase == DECODE):
        return
    yield (*mesh, batch // (dp * pp), 1, int(Recompute.NONE), 0)


def extra_seconds(candidate: Candidate, best: Candidate) -> dict[str, float]:
    """Seconds that each piece of the candidate's step takes beyond the best plan's, worst first.

    Negative where the candidate is faster; they add up to the difference of the steps.
    """
    own, other = candidate.step.seconds_by_piece, best.step.seconds_by_piece
    pieces = {k: float(own.get(k, 0.0)) - float(other.get(k, 0.0)) for k in {**own, **other}}
    return dict(sorted(pieces.items(), key=lambda item: -item[1]))


def select(plans: Plan, index: NDArray[np.intp]) -> Plan:
    """The plans at those positions."""
    return Plan(**{f.name: np.asarray(getattr(plans, f.name))[index] for f in fields(Plan)})


def _asked(step: Step, on: Cluster, pins: Mapping[str, int], splits: Splits) -> Plan:
    """The plans of the space that have the pinned values, their sequences split as asked."""
    check_against_rules(pins, step, on, even=True)
    return narrowed(plan_space(step, on=on), step, pins, splits, on=on)


def check_against_rules(pins: Mapping[str, int], step: Step, on: Cluster, *, even: bool) -> None:
    """Raise `InputError` with the rule of the space that the pins break, or the unknown field."""
    names = [f.name for f in fields(Plan)]
    for name in pins:
        if name not in names:
            raise InputError(f"a plan has no '{name}'; pin one of {', '.join(names)}")
    check_pins(
        pins, step, on=on, max_micro_batch=MAX_MICRO_BATCH, max_interleave=MAX_INTERLEAVE,
        even=even,
    )  # fmt: skip


def narrowed(
    space: Plan, step: Step, pins: Mapping[str, int], splits: Splits, *, on: Cluster
) -> Plan:
    """Those of the plans that have the pinned values, their sequences split as asked, in every
    useful order of the axes or the one pinned.
    """
    late = {k: v for k, v in pins.items() if k in ("sequence", "ulysses")}
    early = {k: v for k, v in pins.items() if k not in late and k != "order"}
    base = _pinned(space, early)
    len_new = int(step.len_seq if isinstance(step, TrainStep) else step.len_new)
    chosen = pinned_splits(late, splits)
    split = _pinned(with_splits(base, chosen, cfg=step.config, len_seq=len_new), late)
    return with_orders(split, on=on, cfg=step.config, order=pins.get("order"))


def _pinned(plans: Plan, pins: Mapping[str, int]) -> Plan:
    """The plans that have the pinned values."""
    keep = np.ones(np.shape(plans.dp), dtype=bool)
    for name, value in pins.items():
        keep &= np.asarray(getattr(plans, name)) == value
    if not keep.any():
        wanted = ", ".join(f"{k}={v}" for k, v in pins.items())
        raise InfeasibleError(f"no plan of the space has {wanted}; loosen a pin")
    return select(plans, np.flatnonzero(keep))


def _ranked(
    plans: Plan, seconds: NDArray[np.float64], upper_s: NDArray[np.float64]
) -> NDArray[np.intp]:
    """Fastest first; equal to a part in 1e9, the smaller upper bound, then the simpler plan."""
    simpler = (plans.order, plans.interleave, plans.ep, plans.etp, plans.cp, plans.pp, plans.tp)
    leaner = (plans.zero_stage, plans.recompute)
    keys = (*simpler, *leaner, _rounded(upper_s), _rounded(seconds))
    return np.lexsort(tuple(np.asarray(k) for k in keys))


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nine significant digits, so that the order of additions breaks no tie."""
    scale: NDArray[np.float64] = 10.0 ** (8 - np.floor(np.log10(np.maximum(values, 1e-30))))
    return np.round(values * scale) / scale


def _best_of_each_mesh(plans: Plan, order: NDArray[np.intp], count: int) -> Iterator[int]:
    seen: set[tuple[float, ...]] = set()
    axes = [np.asarray(getattr(plans, name)) for name in (*COLUMNS[:6], "sequence", "ulysses")]
    for index in order:
        mesh = tuple(float(a[index]) for a in axes)
        if mesh not in seen:
            seen.add(mesh)
            yield int(index)
            if len(seen) == count:
                return


def _why_no_plan(step: Step, on: Cluster) -> str:
    if isinstance(step, TrainStep):
        what = f"global batch {int(step.global_batch)} and sequence {int(step.len_seq)}"
    else:
        what = f"batch {int(step.batch)}"
    return (
        f"no plan divides {what} over {on.num_accelerators} accelerators; choose a batch with "
        "more divisors, or another number of nodes"
    )


def _why_nothing_fits(
    step: Step,
    space: Plan,
    memory: MemoryEstimate,
    budget: float,
    on: Cluster,
    recipe: Recipe,
    pins: Mapping[str, int],
    splits: Splits,
) -> str:
    """The leanest plan and what would make it fit."""
    totals = np.asarray(memory.total)
    leanest = space.at(int(np.argmin(totals)))
    parts = _evaluator(step, on, recipe, None).memory(leanest).bytes_by_part
    largest = max(parts, key=lambda k: float(parts[k]))
    text = (
        f"no plan of {step.config.name} fits {on.num_accelerators} x {on.device.id}: the leanest "
        f"({leanest}) needs {totals.min() / 2**30:.1f} GiB per accelerator of a budget of "
        f"{budget / 2**30:.1f} GiB, mostly {largest} ({float(parts[largest]) / 2**30:.1f} GiB)"
    )
    nodes = _nodes_that_fit(step, budget, on, recipe, pins, splits)
    if nodes:
        return f"{text}; it fits on {nodes} nodes"
    loosen = "loosen a pin, " if pins else ""
    return f"{text}; {loosen}shorten the sequence, shrink the batch or take a larger device"


def _nodes_that_fit(
    step: Step,
    budget: float,
    on: Cluster,
    recipe: Recipe,
    pins: Mapping[str, int],
    splits: Splits,
) -> int | None:
    """The first doubling of the cluster, up to 64 times, on which some plan fits."""
    for factor in (2, 4, 8, 16, 32, 64):
        if on.max_accelerators and on.num_accelerators * factor > on.max_accelerators:
            return None
        larger = replace(on, num_nodes=on.num_nodes * factor)
        try:
            space = _asked(step, larger, pins, splits)
        except (InfeasibleError, InputError):
            continue
        memory = _evaluator(step, larger, recipe, None).memory(space)
        if np.any(np.asarray(memory.total) <= budget):
            return larger.num_nodes
    return None


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0

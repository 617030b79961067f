"""A training step whose stages differ: layers and modes stage by stage, in seconds and bytes.

`training_step` and `training_memory` give every stage ceil(L / p) layers of one mode. Here each
stage says how many layers of which kind it has in which mode (`StageLayers`); the sums are the
same, with the stages' own times t_i,

    step = m max t_i + (sum t_i - max t_i) / v + sends + max_i (exposed exchange_i + update_i)

the exchange of stage i being that of its own parameters under its own passes. With layers of one
kind, equal stages and one mode, it is what `training_step` says.

    Implemented in: `stage_costs` (t_i, its exchange and its bytes), `staged_step`, `staged_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from hwmodels.cluster import Cluster
from hwmodels.errors import InputError
from hwmodels.frozen import FrozenDict
from simulator.context_parallel import buffer_bytes
from simulator.estimate import BOUND
from simulator.felt_exchange import wait_share
from simulator.kernel_time.predict import CALIBRATED
from simulator.layer_modes import (
    FULL,
    NONE,
    OFFLOAD_FULL,
    SELECTIVE,
    Kind,
    ModeCost,
    layer_kinds,
    mode_costs,
)
from simulator.memory import MemoryEstimate, in_flight, state_bytes
from simulator.pieces import (
    BUBBLE,
    DATA,
    OPTIMIZER_STEP,
    PIPELINE,
    RECOMPUTED,
    STRAGGLERS,
    StepEstimate,
    Totals,
    gaps,
    merge,
    send_seconds,
)
from simulator.recipe import Recipe
from simulator.stack import OnDevice
from simulator.step import (
    LayerTimes,
    exposed_data,
    hiding_seconds,
    layer_times,
    optimizer_seconds,
)
from workloads.models.activations import ends_bytes
from workloads.models.parameters import StageParameters, layer_parameters, parameters_per_rank
from workloads.models.transformer import TrainStep
from workloads.numeric import Num, ceil_div
from workloads.plan import Plan

COPIES: Final = "host copies"
MOST_TOLD: Final = 16
"""Stages that an error names one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLayers:
    """Layers of one stage: `counts[kind][mode]`, names as of `layer_modes`."""

    counts: Mapping[str, Mapping[str, int]]

    @property
    def num_layers(self) -> int:
        """All of them."""
        return sum(sum(own.values()) for own in self.counts.values())

    @property
    def modes(self) -> dict[str, int]:
        """Layers by mode, whatever their kind."""
        found: dict[str, int] = {}
        for own in self.counts.values():
            for mode, number in own.items():
                if number:
                    found[mode] = found.get(mode, 0) + number
        return found


def stage_layers(modes_by_kind: Mapping[str, Mapping[str, int]]) -> StageLayers:
    """Layers of one stage, frozen; modes of no layer are left out."""
    return StageLayers(
        counts=FrozenDict(
            {
                kind: FrozenDict({m: n for m, n in own.items() if n})
                for kind, own in modes_by_kind.items()
                if any(own.values())
            }
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage: seconds of a micro-batch, after the pipeline, parameters, bytes by part."""

    seconds: float
    compute: Totals
    exposed: Mapping[str, Num]
    redone: Totals
    copy_s: float
    exposed_exchange_s: float
    update: Totals
    all_exchange_s: float
    moved_s: float
    held: StageParameters
    bytes_by_part: Mapping[str, float]
    host_bytes: float
    copied_bytes: float
    forward_s: float


@dataclass(frozen=True, kw_only=True)
class _Priced:
    """What all stages have in common."""

    step: TrainStep
    plan: Plan
    on: Cluster
    recipe: Recipe
    exchanged: Recipe
    stack: OnDevice | None
    kinds: Mapping[str, tuple[Kind, LayerTimes, Mapping[str, ModeCost]]]
    whole: LayerTimes
    ends: tuple[StageParameters, StageParameters]


def stage_costs(
    step: TrainStep,
    *,
    plan: Plan,
    stages: Sequence[StageLayers],
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None = None,
) -> tuple[StageCost, ...]:
    """Every stage by itself; refuses stages that do not hold the model."""
    p, v = int(plan.pp), int(plan.interleave)
    if len(stages) != p:
        raise InputError(f"{len(stages)} stages are told of a plan with pp = {p}; give {p}")
    total = sum(s.num_layers for s in stages)
    if total != step.config.num_layers or any(s.num_layers % v or not s.num_layers for s in stages):
        raise InputError(
            f"stages of {', '.join(str(s.num_layers) for s in stages)} layers are no split of "
            f"{step.config.num_layers} into multiples of {v}; change one"
        )
    priced = _priced(step, plan, on, recipe, stack)
    _check_kinds(priced, stages)
    return tuple(_stage_cost(priced, i, own) for i, own in enumerate(stages))


def _check_kinds(priced: _Priced, stages: Sequence[StageLayers]) -> None:
    have: dict[str, int] = {}
    for stage in stages:
        for kind, own in stage.counts.items():
            have[kind] = have.get(kind, 0) + sum(own.values())
    kinds, sequence = layer_kinds(priced.step.config, by_attention=apart(priced.plan))
    want = {k.name: sequence.count(i) for i, k in enumerate(kinds)}
    if have != want:
        raise InputError(f"stages hold {have} layers by kind, the model has {want}; change them")


def apart(plan: Plan) -> bool:
    """Are kinds of attention told apart? Not where cp > 1: they share a sequence in one way."""
    return bool(plan.cp == 1)


def _priced(
    step: TrainStep, plan: Plan, on: Cluster, recipe: Recipe, stack: OnDevice | None
) -> _Priced:
    exchanged = recipe if stack is None else stack.stack.exchanged(recipe)
    kinds, sequence = layer_kinds(step.config, by_attention=apart(plan))
    found = {}
    for kind in kinds:
        own = replace(step, config=kind.config)
        times = layer_times(own, plan=plan, on=on, recipe=exchanged, stack=stack)
        costs = mode_costs(times, step, kind, plan=plan, on=on, recipe=recipe, stack=stack)
        found[kind.name] = (kind, times, costs)
    return _Priced(
        step=step, plan=plan, on=on, recipe=recipe, exchanged=exchanged, stack=stack, kinds=found,
        whole=layer_times(step, plan=plan, on=on, recipe=exchanged, stack=stack),
        ends=_ends(step, plan, kinds, sequence),
    )  # fmt: skip


def _ends(
    step: TrainStep, plan: Plan, kinds: Sequence[Kind], sequence: Sequence[int]
) -> tuple[StageParameters, StageParameters]:
    """Parameters of first and last stage beside layers; all in the first where it is alone."""
    num = int(ceil_div(len(sequence), plan.pp))
    found = []
    both = parameters_per_rank(step.config, plan)
    for whole, own in zip(both, (sequence[:num], sequence[-num:]), strict=True):
        dense = sum(parameters_of(kinds[k], plan).dense for k in own)
        experts = sum(parameters_of(kinds[k], plan).experts for k in own)
        found.append(StageParameters(dense=whole.dense - dense, experts=whole.experts - experts))
    if plan.pp == 1:
        found[1] = StageParameters(dense=0, experts=0)
    return found[0], found[1]


def parameters_of(kind: Kind, plan: Plan) -> StageParameters:
    """Parameters of one layer of a kind on one rank."""
    held = layer_parameters(kind.config, kind.block, plan.tp, plan.ep, plan.expert_tp)
    return StageParameters(dense=held.dense, experts=held.experts)


def _stage_cost(priced: _Priced, index: int, own: StageLayers) -> StageCost:
    plan, stack = priced.plan, priced.stack
    first, last = index == 0, index == int(plan.pp) - 1
    compute, redone, exposed = Totals(), Totals(), dict[str, Num]()
    seconds = copy_s = forward_s = hiding_s = kept = host = working = moved = 0.0
    dense: Num = 0.0
    experts: Num = 0.0
    gap = gaps(stack.factors.layer_s if stack else 0.0)
    for name, modes in own.counts.items():
        kind, times, costs = priced.kinds[name]
        held = parameters_of(kind, plan)
        ahead, _ = hiding_seconds(times, waits=stack is not None)
        for mode, number in modes.items():
            cost = costs[mode]
            seconds += number * float(cost.seconds)
            copy_s += number * float(cost.copy_s)
            hiding_s += number * float(cost.hiding_s)
            forward_s += number * float(ahead)
            kept += number * float(cost.kept_bytes)
            host += number * float(cost.host_bytes)
            working = max(working, float(cost.working_bytes))
            dense, experts = dense + number * held.dense, experts + number * held.experts
            compute = compute.plus(times.forward, number).plus(times.backward, number)
            compute = compute.plus(gap, number)
            exposed = merge(exposed, times.exposed_forward, number)
            exposed = merge(exposed, times.exposed_backward, number)
            for table in (times.exchange_forward, times.exchange_backward):
                moved += number * float(sum(table.values(), start=0.0))
            again = {FULL: times.full, OFFLOAD_FULL: times.full, SELECTIVE: times.selective}
            if mode in again:
                redone = redone.plus(again[mode].kernels, number)
                exposed = merge(exposed, again[mode].exposed, number)
                moved += number * float(sum(again[mode].exchange.values(), start=0.0))
    for there, totals, parameters in (
        (first, priced.whole.embedding, priced.ends[0]),
        (last, priced.whole.head, priced.ends[1]),
    ):
        if there:
            seconds += float(totals.lower_s)
            compute = compute.plus(totals)
            dense, experts = dense + parameters.dense, experts + parameters.experts
    stage = StageParameters(dense=dense, experts=experts)
    exchange = exposed_data(
        priced.step, plan, forward_s, hiding_s, priced.on, priced.exchanged, stack, stage
    )
    return StageCost(
        seconds=seconds, compute=compute, exposed=exposed, redone=redone, copy_s=copy_s,
        exposed_exchange_s=float(exchange[1]), all_exchange_s=float(exchange[0]), moved_s=moved,
        update=optimizer_seconds(
            priced.step.config, plan, priced.on, priced.exchanged, stack, stage
        ),
        held=stage,
        bytes_by_part=_bytes(priced, index, stage, kept, working),
        host_bytes=host * float(in_flight(priced.step, plan, index)),
        copied_bytes=host,
        forward_s=forward_s,
    )  # fmt: skip


def _bytes(
    priced: _Priced, index: int, held: StageParameters, kept: float, working: float
) -> dict[str, float]:
    step, plan, recipe = priced.step, priced.plan, priced.recipe
    cfg, flight = step.config, float(in_flight(priced.step, priced.plan, index))
    edges = ends_bytes(
        cfg, batch=plan.micro_batch, len_seq=step.len_seq, plan=plan, dtype=recipe.dtype
    )
    ends = float(edges.embedding) * flight if index == 0 else 0.0
    ends += float(edges.head) if index == int(plan.pp) - 1 else 0.0
    passing = buffer_bytes(cfg, len_seq=step.len_seq, plan=plan, dtype=recipe.dtype)
    parts = state_bytes(cfg, plan, recipe, held) | {
        "activations": kept * flight,
        "working set": working,
        "ends": ends,
        "sequence exchange": passing,
    }
    return {name: float(value) for name, value in parts.items()}


def staged_memory(costs: Sequence[StageCost]) -> MemoryEstimate:
    """The fullest stage."""
    fullest = max(costs, key=lambda c: sum(c.bytes_by_part.values()))
    return MemoryEstimate(bytes_by_part=dict(fullest.bytes_by_part))


def staged_step(
    step: TrainStep,
    costs: Sequence[StageCost],
    *,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None = None,
) -> StepEstimate:
    """The step that stages of these costs make; `recompute` of the plan plays no role."""
    exchanged = recipe if stack is None else stack.stack.exchanged(recipe)
    micro, v = float(plan.num_micro_batches(step.global_batch)), float(plan.interleave)
    slowest = max(costs, key=lambda c: c.seconds)
    latest = max(costs, key=lambda c: c.exposed_exchange_s + float(c.update.lower_s))
    sends_s = float(
        send_seconds(step.config, step.len_seq, plan, on, exchanged, calibrated=stack is not None)
    )
    fill_s = 2 * (float(plan.pp) - 1) * sends_s
    pieces: dict[str, Num] = {k: micro * s for k, s in slowest.compute.by_part.items()}
    pieces |= {k: micro * s for k, s in slowest.exposed.items()}
    pieces[RECOMPUTED] = micro * slowest.redone.lower_s
    pieces[COPIES] = micro * slowest.copy_s
    pieces[BUBBLE] = (sum(c.seconds for c in costs) - slowest.seconds) / v
    pieces |= {PIPELINE: fill_s, DATA: latest.exposed_exchange_s,
               OPTIMIZER_STEP: latest.update.lower_s}  # fmt: skip
    wait = float(wait_share(plan, on, stack)) if stack is not None else 0.0
    if stack is not None:
        pieces[STRAGGLERS] = wait * sum(pieces.values(), start=0.0)
    worked = slowest.compute.plus(slowest.redone)
    return StepEstimate(
        rung=BOUND if stack is None else CALIBRATED,
        plan=plan,
        seconds_by_piece=pieces,
        compute_by_resource={r: micro * s for r, s in worked.by_resource.items()},
        lower_s=_piped([float(c.compute.lower_s + c.redone.lower_s) for c in costs], micro, v)
        + latest.update.lower_s,
        upper_s=(1 + wait) * (_upper_s(costs, micro, v) + 2 * micro * v * sends_s + fill_s),
        num_tokens=step.num_tokens,
        model_flops=step.model_flops,
        peak_flops_per_s=on.device.matmul_rate_flops_per_s(recipe.peak_dtype)[0],
    )  # fmt: skip


def _upper_s(costs: Sequence[StageCost], micro: float, chunks: float) -> float:
    """Nothing overlaps: neither resources nor communication."""
    worked = [float(c.compute.upper_s + c.redone.upper_s) + c.copy_s + c.moved_s for c in costs]
    last = max(c.all_exchange_s + float(c.update.upper_s) for c in costs)
    return _piped(worked, micro, chunks) + last


def _piped(seconds: Sequence[float], micro: float, chunks: float) -> float:
    slowest = max(seconds)
    return micro * slowest + (sum(seconds) - slowest) / chunks


def even_stages(step: TrainStep, plan: Plan, mode: str = NONE) -> tuple[StageLayers, ...]:
    """Stages of ceil(L / p) layers in one mode, the last what is left, as plans have them."""
    num = step.config.num_layers
    most = int(ceil_div(num, plan.pp))
    return counted_stages(
        step, plan, [min(max(num - i * most, 0), most) for i in range(int(plan.pp))], mode
    )


def counted_stages(
    step: TrainStep, plan: Plan, counts: Sequence[int], mode: str = NONE
) -> tuple[StageLayers, ...]:
    """Stages of so many layers each, all in one mode.

    A stage's chunks hold as many each; the model's layers go round the stages, chunk by chunk.
    Refuses what is no split of the layers.
    """
    p, v = int(plan.pp), int(plan.interleave)
    check_counts(counts, step.config.num_layers, p, v)
    kinds, sequence = layer_kinds(step.config, by_attention=apart(plan))
    own: list[list[int]] = [[] for _ in range(p)]
    start = 0
    for _ in range(v):
        for stage, count in enumerate(counts):
            own[stage] += sequence[start : start + count // v]
            start += count // v
    return tuple(
        stage_layers({k.name: {mode: held.count(j)} for j, k in enumerate(kinds)}) for held in own
    )


def check_counts(counts: Sequence[int], num_layers: int, num_stages: int, chunks: int) -> None:
    """Refuses numbers of layers that are no split of the model into such stages and chunks."""
    told = ",".join(map(str, counts[:MOST_TOLD])) + (",..." if len(counts) > MOST_TOLD else "")
    if len(counts) != num_stages:
        raise InputError(
            f"stages {told} are {len(counts)} numbers of a plan with pp = {num_stages}; give "
            f"{num_stages}, or pin pp={len(counts)}"
        )
    if sum(counts) != num_layers:
        raise InputError(
            f"stages {told} hold {sum(counts)} layers, the model has {num_layers}; make the sum "
            f"{num_layers}"
        )
    if min(counts) < 1:
        raise InputError(f"stages {told} leave one empty; give every stage 1 layer or more")
    if any(count % chunks for count in counts):
        raise InputError(
            f"stages {told} do not divide into {chunks} chunks each; give multiples of {chunks}, "
            "or pin v=1"
        )

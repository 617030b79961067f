"""Step time of training as the sum of its pieces, for one plan or an array of them.

Training, with m micro-batches on p stages of v chunks (interleaved 1F1B, Narayanan et al. 2021):

    t_layer  = forward + backward + recomputed forward + exposed communication
    t_stage  = ceil(L / p) t_layer, the last stage what is left of L; plus the embedding on the
               first, the head on the last stage
    pipeline = m max_i t_stage_i + (sum_i t_stage_i - max_i t_stage_i) / v
    step     = pipeline + exposed exchange of gradients and weights + optimizer

What overlaps with what, on this rung:

- tensor and expert parallel collectives wait: they are fully exposed;
- what the ranks of a sequence exchange waits or hides as their split says
  (`simulator.context_parallel`), a ring step by step under attention;
- gradients reduce under a backward pass and weights gather under a forward pass, less what hides
  the ring there, only the excess is exposed: once a step, but ZeRO 2 reduces and ZeRO 3 does both
  for every micro-batch;
- pipeline sends are exposed while the pipeline fills and drains, hidden in between.

`lower_s` hides all communication; `upper_s` exposes all of it and runs every kernel's resources
one after another. Kernels are at the bound rung: a real step takes longer than `seconds`.
Ignored: launch gaps, data loading, stragglers; layers of different kinds are spread evenly over
the stages. Other uneven splits, which could lighten the stage with the head further, are not tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Final, TypeVar

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.device import Device
from hwmodels.dtypes import FP32
from simulator.context_parallel import SplitSeconds, split_seconds
from simulator.distinct import Index, distinct, taken
from simulator.estimate import BOUND
from simulator.exchange import CONTEXT, Exchange, layer_exchanges
from simulator.expert_exchange import NODE_LIMITED
from simulator.expert_step import mtp_layers, with_experts
from simulator.felt_exchange import busy_share, felt_seconds, wait_share
from simulator.kernel_time.predict import CALIBRATED
from simulator.network import bound_seconds, calibrated_seconds
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
    shared_seconds,
    slowest_stage,
    slowest_stage_s,
    total_seconds,
)
from simulator.recipe import Recipe
from simulator.recomputation import (
    exchange_shares,
    full_shares,
    selective_exchange_shares,
    selective_shares,
)
from simulator.stack import SERIAL, Factors, OnDevice
from workloads.axis_order import Spacing
from workloads.models.config import TransformerConfig
from workloads.models.experts import check_experts, expert_replicas
from workloads.models.parameters import StageParameters, parameters_per_rank
from workloads.models.transformer import TrainStep, optimizer
from workloads.numeric import Num, ceil_div, is_scalar, maximum, minimum, where
from workloads.ops.collective import Collective
from workloads.placement import expert_spacing, layer_places, replica_spacing
from workloads.plan import Plan, Recompute
from workloads.sequence_plan import check_plan
from workloads.workload import BACKWARD, FORWARD, Node, Workload

T = TypeVar("T")

BLOCK: Final = 2**13
"""Plans priced together by `step_seconds`: an array of them is 64 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """What recomputation repeats of a layer: kernels, collectives, and what nothing hides of them.

    The attention that hides a ring of K and V runs again with it or not at all.
    """

    kernels: Totals = field(default_factory=Totals)
    exchange: Mapping[str, Num] = field(default_factory=dict)
    exposed: Mapping[str, Num] = field(default_factory=dict)

    @property
    def seconds(self) -> Num:
        """Kernels and exposed collectives."""
        return self.kernels.lower_s + sum(self.exposed.values(), start=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of the mean layer, and of both ends, for one micro-batch on one rank.

    `exchange_*` holds all communication by piece, `exposed_*` what nothing hides; `full` and
    `selective` are what of the forward pass runs again under either recomputation. `mtp`, a part of
    `head`, are forward and backward of the layers in modules of multi-token prediction.
    """

    forward: Totals
    backward: Totals
    embedding: Totals
    head: Totals
    exchange_forward: Mapping[str, Num]
    exchange_backward: Mapping[str, Num]
    exposed_forward: Mapping[str, Num]
    exposed_backward: Mapping[str, Num]
    full: Again
    selective: Again
    mtp: tuple[Totals, Totals] = (Totals(), Totals())


def layer_times(
    step: TrainStep, *, plan: Plan, on: Cluster, recipe: Recipe, stack: OnDevice | None = None
) -> LayerTimes:
    """Mean layer over the model's kinds, and the ends, for one micro-batch of `plan`."""
    cfg, device = step.config, on.device
    check_plan(cfg, plan, step.len_seq)
    forward, backward = Totals(), Totals()
    moved: tuple[dict[str, Num], ...] = ({}, {}, {})
    again = (Again(), Again())
    nodes_of: dict[str, Workload] = {}
    modules = Totals(), Totals()
    whole = stack is None or not stack.stack.early_stop
    for kind, count in cfg.kinds.items():
        share = count / cfg.num_layers
        work = _layer(step, kind, plan, recipe, device, stack)
        passes = [
            total_seconds(work.select(phase=p), on=device, stack=stack) for p in (FORWARD, BACKWARD)
        ]
        forward, backward = forward.plus(passes[0], share), backward.plus(passes[1], share)
        nodes_of[kind] = work
        exchanges = layer_exchanges(
            cfg, kind, len_seq=step.len_seq, plan=plan,
            element_bytes=recipe.dtype.bytes_per_element,
            gathered_bytes=recipe.gathered_activation_bytes(),
            dispatcher=stack.experts.dispatcher if stack else NODE_LIMITED,
        )  # fmt: skip
        times = felt_seconds(exchanges, plan=plan, dtype=recipe.dtype, on=on, stack=stack)
        for exchange, found in zip(exchanges, times, strict=True):
            for into, seconds in zip(moved, found, strict=True):
                into[exchange.piece] = into.get(exchange.piece, 0.0) + share * seconds
        if cfg.num_mtp and kind == cfg.last_kind:
            modules = mtp_layers(cfg, exchanges, times, passes)
        if stack is not None:
            forward_s = [share * found[0] for found in times]
            nodes = work.select(phase=FORWARD)
            again = _again(again, nodes, exchanges, forward_s, share, cfg, plan, on, stack)
    both = step.ends(plan, dtype=recipe.dtype, sequence_parallel=_splits_sequence(stack))
    # Attention is the same in layers of every kind.
    split = split_seconds(
        cfg, list(next(iter(nodes_of.values()))), len_seq=step.len_seq, plan=plan, on=on,
        dtype=recipe.dtype, stack=stack,
    )  # fmt: skip
    everything = Again(kernels=forward, exchange=moved[0], exposed=moved[0])
    times_of = LayerTimes(
        forward=forward,
        backward=backward,
        embedding=total_seconds(both.select(part="embedding"), on=device, stack=stack),
        head=total_seconds((n for n in both if n.part != "embedding"), on=device, stack=stack)
        .plus(modules[0])
        .plus(modules[1]),
        mtp=modules,
        exchange_forward=moved[0],
        exchange_backward=merge(moved[1], moved[2], 1.0),
        exposed_forward=moved[0],
        exposed_backward=moved[1],
        full=everything if whole else replace(again[0], exposed=again[0].exchange),
        selective=replace(again[1], exposed=again[1].exchange),
    )
    divided = _with_split(times_of, split)
    return divided if stack is None else with_experts(divided, cfg, stack.experts)


def _with_split(times: LayerTimes, split: SplitSeconds) -> LayerTimes:
    """With what the ranks of a sequence exchange, and the kernels that this takes."""
    ahead, back, full = split.forward, split.backward, times.full
    return replace(
        times,
        forward=times.forward.plus(ahead.extra),
        backward=times.backward.plus(back.extra),
        exchange_forward=merge(times.exchange_forward, {CONTEXT: ahead.moved}, 1.0),
        exchange_backward=merge(times.exchange_backward, {CONTEXT: back.moved}, 1.0),
        exposed_forward=merge(times.exposed_forward, {CONTEXT: ahead.exposed}, 1.0),
        exposed_backward=merge(times.exposed_backward, {CONTEXT: back.exposed}, 1.0),
        full=Again(
            kernels=full.kernels.plus(ahead.extra).plus(split.kept, -1.0),
            exchange=merge(full.exchange, {CONTEXT: ahead.moved - split.kept_moved}, 1.0),
            exposed=merge(full.exposed, {CONTEXT: ahead.exposed - split.kept_exposed}, 1.0),
        ),
        selective=replace(times.selective, kernels=times.selective.kernels.plus(split.selective)),
    )


def _splits_sequence(stack: OnDevice | None) -> bool:
    return stack is None or stack.stack.sequence_parallel


def _layer(
    step: TrainStep, kind: str, plan: Plan, recipe: Recipe, on: Device, stack: OnDevice | None
) -> Workload:
    """One layer as the framework writes it."""
    return recipe.layer(
        step,
        kind,
        plan,
        on=on,
        fused=stack is None or stack.stack.fused_attention,
        sequence_parallel=_splits_sequence(stack),
    )


def _again(
    so_far: tuple[Again, Again],
    nodes: Sequence[Node],
    exchanges: Sequence[Exchange],
    forward_s: Sequence[Num],
    weight: float,
    cfg: TransformerConfig,
    plan: Plan,
    on: Cluster,
    stack: OnDevice,
) -> tuple[Again, Again]:
    """`so_far` and what full and selective recomputation repeat of one kind of layer."""
    framework = stack.stack
    policies = (
        (full_shares(nodes, framework), exchange_shares(exchanges, framework)),
        (
            selective_shares(nodes, framework, cfg, plan),
            selective_exchange_shares(exchanges, framework),
        ),
    )
    found = []
    for before, (shares, exchanged) in zip(so_far, policies, strict=True):
        kernels = shared_seconds(nodes, shares, on=on.device, stack=stack)
        moved = dict(before.exchange)
        for exchange, share, seconds in zip(exchanges, exchanged, forward_s, strict=True):
            moved[exchange.piece] = moved.get(exchange.piece, 0.0) + share * seconds
        found.append(Again(kernels=before.kernels.plus(kernels, weight), exchange=moved))
    return found[0], found[1]


def training_step(
    step: TrainStep, *, plan: Plan, on: Cluster, recipe: Recipe, stack: OnDevice | None = None
) -> StepEstimate:
    """Step time under one plan or an array of them; feasibility is not judged here.

    Bound rung without a `stack`; with one, kernels as its framework runs them.
    """
    recipe = recipe if stack is None else stack.stack.exchanged(recipe)
    parts = _parts(step, plan, on, recipe, stack)
    return _assembled(step, parts.at(slice(None)), plan, on, recipe, stack)


def step_seconds(
    step: TrainStep, *, plan: Plan, on: Cluster, recipe: Recipe, stack: OnDevice | None = None
) -> Num:
    """`training_step(...).seconds` and nothing else, for many plans.

    A block of plans at a time: its arrays stay in the processor's cache.
    """
    recipe = recipe if stack is None else stack.stack.exchanged(recipe)
    parts = _parts(step, plan, on, recipe, stack)
    parts = replace(parts, times=_without_parts(parts.times))
    shape = np.broadcast_shapes(*(np.shape(getattr(plan, f.name)) for f in fields(Plan)))
    if not shape or not is_scalar(step.len_seq):
        return _assembled(step, parts.at(slice(None)), plan, on, recipe, stack).seconds
    columns = {f.name: np.broadcast_to(getattr(plan, f.name), shape) for f in fields(Plan)}
    columns = {name: column.reshape(-1) for name, column in columns.items()}
    seconds = np.empty(math.prod(shape))
    for start in range(0, seconds.size, BLOCK):
        block = slice(start, start + BLOCK)
        some = Plan(**{name: column[block] for name, column in columns.items()})
        made = _assembled(step, parts.at(block), some, on, recipe, stack)
        seconds[block] = made.seconds
    return seconds.reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a step is assembled from, priced for the plans that differ; `*_at` where each plan finds
    its own, None where it is priced for each.
    """

    times: LayerTimes
    sends_s: Num
    moved: DataExchange
    update: Totals
    times_at: Index | None
    sends_at: Index | None
    moved_at: Index | None

    def at(self, block: slice) -> _Parts:
        """Priced for each plan of a block."""
        return _Parts(
            times=_at(self.times, self.times_at, block),
            sends_s=_at(self.sends_s, self.sends_at, block),
            moved=_at(self.moved, self.moved_at, block),
            update=_at(self.update, self.moved_at, block),
            times_at=None,
            sends_at=None,
            moved_at=None,
        )


def _at(value: T, index: Index | None, block: slice) -> T:
    if index is None:
        return value
    whole = block == slice(None)
    return taken(value, index if whole else index.reshape(-1)[block])


def _parts(
    step: TrainStep, plan: Plan, on: Cluster, recipe: Recipe, stack: OnDevice | None
) -> _Parts:
    cfg, real = step.config, stack is not None
    check_experts(cfg, plan)
    # Arrays of sequence lengths pair up with the plans: nothing may be reordered then.
    alike = is_scalar(step.len_seq)
    shapes, times_at = distinct_shapes(plan) if alike else (plan, None)
    senders, sends_at = distinct(plan, _SENDS) if alike else (plan, None)
    groups, moved_at = distinct(plan, _GROUPS) if alike else (plan, None)
    return _Parts(
        times=layer_times(step, plan=shapes, on=on, recipe=recipe, stack=stack),
        sends_s=send_seconds(cfg, step.len_seq, senders, on, recipe, calibrated=real),
        moved=data_exchange(cfg, groups, on, recipe, calibrated=real),
        update=optimizer_seconds(cfg, groups, on, recipe, stack),
        times_at=times_at,
        sends_at=sends_at,
        moved_at=moved_at,
    )


def _without_parts(times: LayerTimes) -> LayerTimes:
    """The same seconds, told by no part and no resource: sums that nobody reads take time too."""

    def lean(t: Totals) -> Totals:
        return Totals(lower_s=t.lower_s, upper_s=t.upper_s, by_part={"all": t.lower_s})

    def again(a: Again) -> Again:
        return replace(a, kernels=lean(a.kernels))

    return replace(
        times,
        forward=lean(times.forward),
        backward=lean(times.backward),
        embedding=lean(times.embedding),
        head=lean(times.head),
        full=again(times.full),
        selective=again(times.selective),
        mtp=(lean(times.mtp[0]), lean(times.mtp[1])),
    )


def _assembled(
    step: TrainStep,
    parts: _Parts,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None,
) -> StepEstimate:
    """The step of every plan from its parts."""
    cfg, sends_s, update = step.config, parts.sends_s, parts.update
    num_micro = plan.num_micro_batches(step.global_batch)
    pipeline = _pipeline(cfg, parts.times, plan, num_micro, stack.factors if stack else None)
    data_all, data_exposed = _exposed(
        step, plan, parts.moved, pipeline.forward_s, pipeline.backward_s, on, stack
    )
    fill_sends = 2 * (plan.pp - 1) * sends_s
    pieces = {
        **pipeline.pieces,
        PIPELINE: fill_sends,
        DATA: data_exposed,
        OPTIMIZER_STEP: update.lower_s,
    }
    wait = wait_share(plan, on, stack) if stack is not None else 0.0
    if stack is not None:
        pieces |= {STRAGGLERS: wait * sum(pieces.values(), start=0.0)}
    exchange_s = pipeline.exchange_s + 2 * num_micro * plan.interleave * sends_s
    upper_s = pipeline.compute_upper_s + exchange_s + fill_sends + data_all + update.upper_s
    return StepEstimate(
        rung=BOUND if stack is None else CALIBRATED,
        plan=plan,
        seconds_by_piece=pieces,
        compute_by_resource=pipeline.by_resource,
        lower_s=pipeline.compute_lower_s + update.lower_s,
        upper_s=(1 + wait) * upper_s,
        num_tokens=step.num_tokens,
        model_flops=step.model_flops,
        peak_flops_per_s=on.device.matmul_rate_flops_per_s(recipe.peak_dtype)[0],
    )


def busy_frac(
    step: TrainStep, plan: Plan, moved: DataExchange, on: Cluster, stack: OnDevice
) -> Num:
    """Share of a step's data-parallel exchange in which it keeps a device's own links busy."""
    if stack.stack.exposed == SERIAL:  # nothing is hidden
        return 1.0
    reduces, gathers = exchanges_a_step(plan, plan.num_micro_batches(step.global_batch))
    sent_bytes = reduces * moved.reduce_bytes + gathers * moved.gather_bytes
    return busy_share(sent_bytes, reduces * moved.reduce_s + gathers * moved.gather_s, on)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pipeline:
    """The m micro-batches through the stages: pieces, and the passes of one stage."""

    pieces: Mapping[str, Num]
    by_resource: Mapping[str, Num]
    forward_s: Num
    backward_s: Num
    exchange_s: Num
    compute_lower_s: Num
    compute_upper_s: Num


def _pipeline(
    cfg: TransformerConfig, times: LayerTimes, plan: Plan, num_micro: Num, factors: Factors | None
) -> _Pipeline:
    again = where(plan.recompute == Recompute.FULL, 1.0, 0.0)
    some = where(plan.recompute == Recompute.SELECTIVE, 1.0, 0.0)
    redone_once = Totals().plus(times.full.kernels, again).plus(times.selective.kernels, some)
    passes = (
        times.forward.plus(redone_once)
        .plus(times.backward)
        .plus(gaps(factors.layer_s if factors else 0.0))
    )
    exposed = merge(times.exposed_forward, times.exposed_backward, 1.0)
    moved = merge(times.exchange_forward, times.exchange_backward, 1.0)
    for part, share in ((times.full, again), (times.selective, some)):
        exposed = merge(exposed, part.exposed, share)
        moved = merge(moved, part.exchange, share)
    layer_s = passes.lower_s + sum(exposed.values(), start=0.0)

    num_layers, embedding_here, head_here = slowest_stage(
        cfg.num_layers, layer_s, times.embedding.lower_s, times.head.lower_s, plan
    )
    extra = Totals().plus(times.embedding, embedding_here).plus(times.head, head_here)
    both_lower = times.embedding.lower_s + times.head.lower_s
    both_upper = times.embedding.upper_s + times.head.upper_s
    slowest = num_layers * layer_s + extra.lower_s
    bubble = (cfg.num_layers * layer_s + both_lower - slowest) / plan.interleave
    # Without communication, or with all of it, another stage may be the slowest.
    lower, upper = (
        slowest_stage_s(cfg.num_layers, layer, embedding, head, plan)
        for layer, embedding, head in (
            (passes.lower_s, times.embedding.lower_s, times.head.lower_s),
            (passes.upper_s, times.embedding.upper_s, times.head.upper_s),
        )
    )
    most = ceil_div(cfg.num_layers, plan.pp)
    least = maximum(cfg.num_layers - most * (plan.pp - 1), 0)
    moving_layers = num_micro * most + (cfg.num_layers - least) / plan.interleave
    fill_lower = (cfg.num_layers * passes.lower_s + both_lower - lower) / plan.interleave
    fill_upper = (cfg.num_layers * passes.upper_s + both_upper - upper) / plan.interleave

    waits = factors is not None
    forward_s, backward_s = hiding_seconds(times, waits=waits)
    repeated_s = again * room_of(times.full, waits) + some * room_of(times.selective, waits)
    on_slowest = Totals().plus(passes, num_layers).plus(extra)
    parts = {part: num_micro * s for part, s in on_slowest.by_part.items()}
    redone = merge({}, redone_once.by_part, num_layers * num_micro)
    parts = {part: s - redone.get(part, 0.0) for part, s in parts.items()}
    pieces = parts | {RECOMPUTED: sum(redone.values(), start=0.0)}
    pieces |= {piece: num_micro * num_layers * s for piece, s in exposed.items()}
    pieces[BUBBLE] = bubble
    return _Pipeline(
        pieces=pieces,
        by_resource={r: num_micro * s for r, s in on_slowest.by_resource.items()},
        forward_s=num_layers * forward_s,
        backward_s=num_layers * (backward_s + repeated_s),
        exchange_s=moving_layers * sum(moved.values(), start=0.0),
        compute_lower_s=num_micro * lower + fill_lower,
        compute_upper_s=num_micro * upper + fill_upper,
    )


def hiding_seconds(times: LayerTimes, *, waits: bool) -> tuple[Num, Num]:
    """Seconds of a layer's passes under which gradients and weights can hide.

    Kernels that hide the context ring cannot hide these as well; with `waits`, what waits for
    tensor-parallel collectives hides them too.
    """
    forward_s = times.forward.lower_s - (
        times.exchange_forward[CONTEXT] - times.exposed_forward[CONTEXT]
    )
    backward_s = times.backward.lower_s - (
        times.exchange_backward[CONTEXT] - times.exposed_backward[CONTEXT]
    )
    if waits:
        forward_s = forward_s + sum(times.exposed_forward.values(), start=0.0)
        backward_s = backward_s + sum(times.exposed_backward.values(), start=0.0)
    return forward_s, backward_s


def room_of(again: Again, waits: bool) -> Num:
    """Seconds of what is repeated under which gradients can hide."""
    ring = again.exchange.get(CONTEXT, 0.0) - again.exposed.get(CONTEXT, 0.0)
    return (again.seconds if waits else again.kernels.lower_s) - ring


def exposed_data(
    step: TrainStep,
    plan: Plan,
    forward_s: Num,
    backward_s: Num,
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None,
    held: StageParameters | None = None,
) -> tuple[Num, Num]:
    """Seconds of gradient and weight exchange: all of it, and what it costs beyond the passes.

    Of the larger end stage, or of one with the parameters `held`, under its own passes of one
    micro-batch. `recipe` has gradients as the framework exchanges them.
    """
    moved = data_exchange(step.config, plan, on, recipe, held, calibrated=stack is not None)
    return _exposed(step, plan, moved, forward_s, backward_s, on, stack)


def _exposed(
    step: TrainStep,
    plan: Plan,
    moved: DataExchange,
    forward_s: Num,
    backward_s: Num,
    on: Cluster,
    stack: OnDevice | None,
) -> tuple[Num, Num]:
    num_micro = plan.num_micro_batches(step.global_batch)
    all_s, exposed = exposed_exchange(
        plan, num_micro, moved.reduce_s, moved.gather_s, forward_s, backward_s
    )
    if stack is not None:
        busy = busy_frac(step, plan, moved, on, stack)
        felt = felt_share(plan, stack) * (all_s - exposed) * busy
        exposed = minimum(exposed + felt, all_s)  # hiding costs no more than waiting for it
    return all_s, exposed


def exposed_exchange(
    plan: Plan, num_micro: Num, reduce_s: Num, gather_s: Num, forward_s: Num, backward_s: Num
) -> tuple[Num, Num]:
    """Exchange of a stage that reduces and gathers once in that time: all, and what is exposed.

    `forward_s` and `backward_s` are the passes of one micro-batch that hide it. Once a step,
    weights hide under a forward and gradients under a backward pass. ZeRO 2 reduces after every
    micro-batch, which hides under the next one's passes too, and ZeRO 3 has one port for both all
    step long.
    """
    reduces, gathers = exchanges_a_step(plan, num_micro)
    before = maximum(gather_s - forward_s, 0.0)
    room = reduces * backward_s + (reduces - 1) * forward_s
    after = maximum(maximum(reduce_s - backward_s, reduces * reduce_s - room), 0.0)
    all_s = gathers * gather_s + reduces * reduce_s
    whole = maximum(all_s - num_micro * (forward_s + backward_s), 0.0)
    sharded = plan.zero_stage >= 3
    return all_s, where(sharded, whole, before + after)


def exchanges_a_step(plan: Plan, num_micro: Num) -> tuple[Num, Num]:
    """How often a stage reduces its gradients and gathers its weights, by ZeRO stage."""
    reduces = where(plan.zero_stage >= 2, num_micro, 1.0)
    return reduces, where(plan.zero_stage >= 3, 2 * num_micro, 1.0)  # again for the backward pass


def felt_share(plan: Plan, stack: OnDevice) -> Num:
    """Seconds that a second of hidden exchange costs the kernels over it.

    Once a step, the first and the last passes of all stages follow each other.
    """
    stages = where(plan.zero_stage >= 2, 1.0, 1 + (plan.pp - 1) / plan.interleave)
    return stack.factors.exposed * stages


@dataclass(frozen=True, slots=True, kw_only=True)
class DataExchange:
    """Gradients of a stage reduced once, its weights gathered once: seconds, bytes a rank sends."""

    reduce_s: Num
    gather_s: Num
    reduce_bytes: Num
    gather_bytes: Num


def data_exchange(
    cfg: TransformerConfig,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    held: StageParameters | None = None,
    *,
    calibrated: bool = False,
) -> DataExchange:
    """Exchange of the larger end stage, or of one with the parameters `held`."""
    once = calibrated_seconds if calibrated else bound_seconds
    sharded = plan.zero_stage >= 1
    sums: list[Num] = [0.0] * 4
    for parameters, ranks, apart in replicated_parameters(cfg, plan, held):
        made = {
            kind: Collective(kind=kind, num_bytes=parameters * size, num_ranks=ranks)
            for kind, size in _exchanged(cfg, recipe).items()
        }
        seconds = {kind: once(c, on=on, stride=apart) for kind, c in made.items()}
        sent = {kind: c.wire_bytes() for kind, c in made.items()}
        for i, values in enumerate((seconds, sent)):
            reduced = where(sharded, values["reduce_scatter"], values["all_reduce"])
            sums[2 * i] = sums[2 * i] + reduced
            sums[2 * i + 1] = sums[2 * i + 1] + where(sharded, values["all_gather"], 0.0)
    return DataExchange(
        reduce_s=sums[0], gather_s=sums[1], reduce_bytes=sums[2], gather_bytes=sums[3]
    )


def data_seconds(
    cfg: TransformerConfig,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    held: StageParameters | None = None,
    *,
    calibrated: bool = False,
) -> tuple[Num, Num]:
    """Seconds in which a stage's gradients are reduced once, and its weights gathered once."""
    moved = data_exchange(cfg, plan, on, recipe, held, calibrated=calibrated)
    return moved.reduce_s, moved.gather_s


def _exchanged(cfg: TransformerConfig, recipe: Recipe) -> dict[str, float]:
    """Bytes per parameter that data-parallel ranks exchange, by collective."""
    return {
        "all_reduce": recipe.gradient_bytes,
        "reduce_scatter": recipe.gradient_bytes,
        "all_gather": recipe.gathered_bytes(cfg),
    }


def replicated_parameters(
    cfg: TransformerConfig, plan: Plan, held: StageParameters | None = None
) -> tuple[tuple[Num, Num, Spacing], tuple[Num, Num, Spacing]]:
    """(parameters, replicas, where they lie) of dense weights, then of experts.

    Of the larger end stage, or of one with the parameters `held`.
    """
    if held is None:
        first, last = parameters_per_rank(cfg, plan)
        held = StageParameters(
            dense=maximum(first.dense, last.dense), experts=maximum(first.experts, last.experts)
        )
    replicas = expert_replicas(plan)
    return (
        (held.dense, plan.dp * plan.cp, replica_spacing(plan)),
        (held.experts, replicas, expert_spacing(plan, plan.expert_tp * plan.ep, replicas)),
    )


def optimizer_seconds(
    cfg: TransformerConfig,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None,
    held: StageParameters | None = None,
) -> Totals:
    """The parameter update, on a shard where ZeRO shards the optimizer."""
    sharded = plan.zero_stage >= 1
    own: Num = 0.0
    for parameters, replicas, _ in replicated_parameters(cfg, plan, held):
        own = own + where(sharded, ceil_div(parameters, replicas), parameters)
    # In single precision the master copy is the weight: there is no other to write.
    copy_bytes = 0 if recipe.dtype == FP32 else recipe.weight_bytes
    nodes = optimizer(own, grad_bytes=recipe.gradient_bytes, weight_bytes=copy_bytes)
    cast = total_seconds(recipe.weight_casts(cfg, plan, on.device), on=on.device, stack=stack)
    if stack is None:
        return total_seconds(nodes, on=on.device).plus(cast)
    factor = stack.factors.optimizer / stack.factors.pointwise
    return cast.plus(total_seconds(nodes, on=on.device, stack=stack), factor)


def distinct_shapes(plan: Plan) -> tuple[Plan, Index | None]:
    """The plans that differ in what one rank computes, and where each plan finds its own.

    A rank's kernels depend on the fields of `_SHAPE` only, its exchange on where its groups lie
    too, so thousands of plans share a few dozen shapes.
    """
    if not np.any(plan.order):  # where a layer's groups lie depends on its own degrees alone
        return distinct(plan, _SHAPE)
    return distinct(plan, _SHAPE, by=layer_places(plan), carried=("dp", "pp", "order"))


_SHAPE: Final = ("tp", "cp", "ep", "etp", "micro_batch", "sequence", "ulysses")
"""Fields of a plan that decide what one rank computes and exchanges in a layer."""
_GROUPS: Final = ("dp", "tp", "pp", "cp", "ep", "etp", "zero_stage", "order")
"""Fields that decide what data-parallel ranks exchange and update."""
_SENDS: Final = ("dp", "tp", "pp", "cp", "micro_batch", "order")
"""Fields that decide what a stage sends to the next."""

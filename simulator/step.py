"""Step time of training as the sum of its pieces, for one plan or an array of them.

Training, with m micro-batches on p stages of v chunks (interleaved 1F1B, Narayanan et al. 2021):

    t_layer  = forward + backward + recomputed forward + exposed communication
    t_stage  = ceil(L / p) t_layer, the last stage what is left of L; plus the embedding on the
               first, the head on the last stage
    pipeline = m max_i t_stage_i + (sum_i t_stage_i - max_i t_stage_i) / v
    step     = pipeline + exposed exchange of gradients and weights + optimizer

What overlaps with what, on this rung:

- tensor and expert parallel collectives wait: they are fully exposed;
- the context-parallel ring hides under attention: only the excess is exposed;
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

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.dtypes import FP32
from simulator.estimate import BOUND
from simulator.exchange import CONTEXT, TENSOR, layer_exchanges
from simulator.kernel_time.predict import CALIBRATED
from simulator.network import estimate_collective
from simulator.pieces import (
    BUBBLE,
    DATA,
    OPTIMIZER_STEP,
    PIPELINE,
    RECOMPUTED,
    StepEstimate,
    Totals,
    excess_over,
    gaps,
    is_attention,
    merge,
    recomputed,
    send_seconds,
    slowest_stage,
    slowest_stage_s,
    total_seconds,
)
from simulator.recipe import Recipe
from simulator.stack import Factors, OnDevice
from workloads.models.config import TransformerConfig
from workloads.models.parameters import parameters_per_rank
from workloads.models.transformer import TrainStep, optimizer
from workloads.numeric import Num, ceil_div, is_scalar, maximum, where
from workloads.ops.collective import Collective
from workloads.plan import Plan, Recompute
from workloads.workload import BACKWARD, FORWARD


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of the mean layer, and of both ends, for one micro-batch on one rank.

    `exchange_*` holds all communication by piece, `exposed_*` what nothing hides, `selective` what
    of the forward pass runs again under selective recomputation.
    """

    forward: Totals
    backward: Totals
    embedding: Totals
    head: Totals
    exchange_forward: Mapping[str, Num]
    exchange_backward: Mapping[str, Num]
    exposed_forward: Mapping[str, Num]
    exposed_backward: Mapping[str, Num]
    selective: Totals


def layer_times(
    step: TrainStep, *, plan: Plan, on: Cluster, recipe: Recipe, stack: OnDevice | None = None
) -> LayerTimes:
    """Mean layer over the model's kinds, and the ends, for one micro-batch of `plan`."""
    cfg, device = step.config, on.device
    shares = {kind: count / cfg.num_layers for kind, count in cfg.kinds.items()}
    element_bytes = recipe.dtype.bytes_per_element
    forward, backward, selective = Totals(), Totals(), Totals()
    fused = stack is None or stack.stack.fused_attention
    moved: tuple[dict[str, Num], ...] = ({}, {}, {})
    cores: list[Num] = [0.0, 0.0]
    for kind, share in shares.items():
        work = step.layer(kind, plan, dtype=recipe.dtype, fused=fused)
        passes = [
            total_seconds(work.select(phase=p), on=device, stack=stack) for p in (FORWARD, BACKWARD)
        ]
        forward, backward = forward.plus(passes[0], share), backward.plus(passes[1], share)
        if stack is not None:
            again = recomputed(work.select(phase=FORWARD), passes[0], on=device, stack=stack)
            selective = selective.plus(again, share)
        for i, phase in enumerate((FORWARD, BACKWARD)):
            attention = filter(is_attention, work.select(phase=phase))
            core = total_seconds(attention, on=device, stack=stack)
            cores[i] = cores[i] + share * core.lower_s
        for exchange in layer_exchanges(
            cfg, kind, len_seq=step.len_seq, plan=plan, element_bytes=element_bytes
        ):
            felt = share * (stack.factors.tensor if stack and exchange.piece == TENSOR else 1.0)
            times = exchange.seconds(on=on, calibrated=stack is not None)
            for into, seconds in zip(moved, times, strict=True):
                into[exchange.piece] = into.get(exchange.piece, 0.0) + felt * seconds
    both = step.ends(plan, dtype=recipe.dtype)
    exposed = [excess_over(moved[i], CONTEXT, core) for i, core in enumerate(cores)]
    return LayerTimes(
        forward=forward,
        backward=backward,
        embedding=total_seconds(both.select(part="embedding"), on=device, stack=stack),
        head=total_seconds((n for n in both if n.part != "embedding"), on=device, stack=stack),
        exchange_forward=moved[0],
        exchange_backward=merge(moved[1], moved[2], 1.0),
        exposed_forward=exposed[0],
        exposed_backward=exposed[1],
        selective=selective,
    )


def training_step(
    step: TrainStep, *, plan: Plan, on: Cluster, recipe: Recipe, stack: OnDevice | None = None
) -> StepEstimate:
    """Step time under one plan or an array of them; feasibility is not judged here.

    Bound rung without a `stack`; with one, kernels as its framework runs them.
    """
    cfg = step.config
    # Arrays of sequence lengths pair up with the plans: nothing may be reordered then.
    shapes, inverse = distinct_shapes(plan) if is_scalar(step.len_seq) else (plan, None)
    times = layer_times(step, plan=shapes, on=on, recipe=recipe, stack=stack)
    if inverse is not None:
        times = _take(times, inverse)
    num_micro = plan.num_micro_batches(step.global_batch)
    pipeline = _pipeline(cfg, times, plan, num_micro, stack.factors if stack else None)
    sends_s = send_seconds(cfg, step.len_seq, plan, on, recipe)
    data_all, data_exposed = _data_exchange(cfg, plan, pipeline, num_micro, on, recipe)
    if stack is not None:
        # Once a step, the first and the last passes of all stages follow each other.
        stages = where(plan.zero_stage >= 2, 1.0, 1 + (plan.pp - 1) / plan.interleave)
        hidden = data_all - data_exposed
        data_exposed = data_exposed + stack.factors.exposed * stages * hidden
    update = optimizer_seconds(cfg, plan, on, recipe, stack)
    fill_sends = 2 * (plan.pp - 1) * sends_s
    pieces = {
        **pipeline.pieces,
        PIPELINE: fill_sends,
        DATA: data_exposed,
        OPTIMIZER_STEP: update.lower_s,
    }
    exchange_s = pipeline.exchange_s + 2 * num_micro * plan.interleave * sends_s
    return StepEstimate(
        rung=BOUND if stack is None else CALIBRATED,
        plan=plan,
        seconds_by_piece=pieces,
        compute_by_resource=pipeline.by_resource,
        lower_s=pipeline.compute_lower_s + update.lower_s,
        upper_s=pipeline.compute_upper_s + exchange_s + fill_sends + data_all + update.upper_s,
        num_tokens=step.num_tokens,
        model_flops=step.model_flops,
        peak_flops_per_s=on.device.matmul_rate_flops_per_s(recipe.dtype)[0],
    )


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
    redone_once = Totals().plus(times.forward, again).plus(times.selective, some)
    passes = (
        times.forward.plus(redone_once)
        .plus(times.backward)
        .plus(gaps(factors.layer_s if factors else 0.0))
    )
    exposed = merge(times.exposed_forward, times.exposed_forward, again)
    exposed = merge(exposed, times.exposed_backward, 1.0)
    moved = merge(times.exchange_forward, times.exchange_forward, again)
    moved = merge(moved, times.exchange_backward, 1.0)
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

    # Kernels that hide the context ring cannot hide gradients and weights as well.
    forward_s = times.forward.lower_s - (
        times.exchange_forward[CONTEXT] - times.exposed_forward[CONTEXT]
    )
    backward_s = times.backward.lower_s - (
        times.exchange_backward[CONTEXT] - times.exposed_backward[CONTEXT]
    )
    if factors is not None:  # what waits for tensor-parallel collectives hides gradients too
        forward_s = forward_s + sum(times.exposed_forward.values(), start=0.0)
        backward_s = backward_s + sum(times.exposed_backward.values(), start=0.0)
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
        backward_s=num_layers * (backward_s + again * forward_s + some * times.selective.lower_s),
        exchange_s=moving_layers * sum(moved.values(), start=0.0),
        compute_lower_s=num_micro * lower + fill_lower,
        compute_upper_s=num_micro * upper + fill_upper,
    )


def _data_exchange(
    cfg: TransformerConfig,
    plan: Plan,
    pipeline: _Pipeline,
    num_micro: Num,
    on: Cluster,
    recipe: Recipe,
) -> tuple[Num, Num]:
    """Seconds of gradient and weight exchange: all of it, and what nothing hides.

    Once a step, weights hide under a forward and gradients under a backward pass. ZeRO 2 reduces
    after every micro-batch, which hides under the next one's passes too, and ZeRO 3 has one port
    for both all step long.
    """
    reduce_s, gather_s = data_seconds(cfg, plan, on, recipe)
    forward_s, backward_s = pipeline.forward_s, pipeline.backward_s
    reduces = where(plan.zero_stage >= 2, num_micro, 1.0)
    gathers = where(plan.zero_stage >= 3, 2 * num_micro, 1.0)  # again for the backward pass
    before = maximum(gather_s - forward_s, 0.0)
    room = reduces * backward_s + (reduces - 1) * forward_s
    after = maximum(maximum(reduce_s - backward_s, reduces * reduce_s - room), 0.0)
    all_s = gathers * gather_s + reduces * reduce_s
    whole = maximum(all_s - num_micro * (forward_s + backward_s), 0.0)
    sharded = plan.zero_stage >= 3
    return all_s, where(sharded, whole, before + after)


def data_seconds(
    cfg: TransformerConfig, plan: Plan, on: Cluster, recipe: Recipe
) -> tuple[Num, Num]:
    """Seconds in which a stage's gradients are reduced once, and its weights gathered once."""
    reduce_s: Num = 0.0
    gather_s: Num = 0.0
    for parameters, ranks, stride in replicated_parameters(cfg, plan):
        seconds = {
            kind: estimate_collective(
                Collective(kind=kind, num_bytes=parameters * size, num_ranks=ranks),
                on=on,
                stride=stride,
            ).lower_s
            for kind, size in (
                ("all_reduce", recipe.gradient_bytes),
                ("reduce_scatter", recipe.gradient_bytes),
                ("all_gather", recipe.weight_bytes),
            )
        }
        sharded = plan.zero_stage >= 1
        reduce_s = reduce_s + where(sharded, seconds["reduce_scatter"], seconds["all_reduce"])
        gather_s = gather_s + where(sharded, seconds["all_gather"], 0.0)
    return reduce_s, gather_s


def replicated_parameters(
    cfg: TransformerConfig, plan: Plan
) -> tuple[tuple[Num, Num, Num], tuple[Num, Num, Num]]:
    """(parameters, replicas, stride) of the larger end stage: dense weights, then experts."""
    first, last = parameters_per_rank(cfg, plan)
    replicas = plan.dp * plan.cp
    return (
        (maximum(first.dense, last.dense), replicas, plan.tp),
        (maximum(first.experts, last.experts), maximum(replicas / plan.ep, 1), plan.tp * plan.ep),
    )


def optimizer_seconds(
    cfg: TransformerConfig, plan: Plan, on: Cluster, recipe: Recipe, stack: OnDevice | None
) -> Totals:
    """The parameter update, on a shard where ZeRO shards the optimizer."""
    sharded = plan.zero_stage >= 1
    own: Num = 0.0
    for parameters, replicas, _ in replicated_parameters(cfg, plan):
        own = own + where(sharded, ceil_div(parameters, replicas), parameters)
    # In single precision the master copy is the weight: there is no other to write.
    copy_bytes = 0 if recipe.dtype == FP32 else recipe.weight_bytes
    nodes = optimizer(own, grad_bytes=recipe.gradient_bytes, weight_bytes=copy_bytes)
    if stack is None:
        return total_seconds(nodes, on=on.device)
    factor = stack.factors.optimizer / stack.factors.pointwise
    return Totals().plus(total_seconds(nodes, on=on.device, stack=stack), factor)


def distinct_shapes(plan: Plan) -> tuple[Plan, np.ndarray | None]:
    """The plans that differ in what one rank computes, and where each plan finds its own.

    A rank's kernels depend on tp, cp, ep and the micro-batch only, so thousands of plans share
    a few dozen shapes.
    """
    keys = (plan.tp, plan.cp, plan.ep, plan.micro_batch)
    if not any(isinstance(k, np.ndarray) for k in keys):
        return plan, None
    columns = [np.asarray(c, dtype=np.int64) for c in np.broadcast_arrays(*keys)]
    code = np.zeros(columns[0].shape, dtype=np.int64)
    for column in columns:
        code = code * (int(column.max()) + 1) + column
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    tp, cp, ep, micro = (c.reshape(-1)[first].astype(np.float64) for c in columns)
    return Plan(tp=tp, cp=cp, ep=ep, micro_batch=micro), inverse.reshape(code.shape)


def _take(times: LayerTimes, index: np.ndarray) -> LayerTimes:
    """The same times for every plan of the array that `index` belongs to."""

    def num(value: Num) -> Num:
        return value[index] if isinstance(value, np.ndarray) else value

    def table(values: Mapping[str, Num]) -> dict[str, Num]:
        return {key: num(v) for key, v in values.items()}

    def totals(t: Totals) -> Totals:
        return Totals(
            lower_s=num(t.lower_s),
            upper_s=num(t.upper_s),
            by_part=table(t.by_part),
            by_resource=table(t.by_resource),
        )

    return LayerTimes(
        forward=totals(times.forward),
        backward=totals(times.backward),
        embedding=totals(times.embedding),
        head=totals(times.head),
        exchange_forward=table(times.exchange_forward),
        exchange_backward=table(times.exchange_backward),
        exposed_forward=table(times.exposed_forward),
        exposed_backward=table(times.exposed_backward),
        selective=totals(times.selective),
    )

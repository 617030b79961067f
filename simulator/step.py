"""Step time of training and inference as the sum of its pieces, for one plan or an array of them.

Training, with m micro-batches on p stages of v chunks (interleaved 1F1B, Narayanan et al. 2021):

    t_layer  = forward + backward + recomputed forward + exposed communication
    t_stage  = ceil(L / p) t_layer, plus the embedding on the first, the head on the last stage
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
the stages, and a stage holds ceil(L / p) of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.device import Device
from simulator.estimate import BOUND, Estimate, estimate
from simulator.exchange import CONTEXT, EXPERT, TENSOR, layer_exchanges
from simulator.network import estimate_collective
from simulator.recipe import Recipe
from workloads.models.config import TransformerConfig
from workloads.models.parameters import parameters_per_rank
from workloads.models.transformer import (
    DECODE,
    Inference,
    TrainStep,
    model_flops_forward,
    optimizer,
)
from workloads.numeric import Num, ceil_div, is_scalar, maximum, where
from workloads.ops.collective import Collective
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.plan import Plan, Recompute
from workloads.workload import BACKWARD, FORWARD, Node

PIPELINE, BUBBLE, DATA = "pipeline sends", "pipeline bubble", "data parallel"
RECOMPUTED, OPTIMIZER_STEP = "recompute", "optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Seconds of a set of nodes run one after another."""

    lower_s: Num = 0.0
    upper_s: Num = 0.0
    by_part: Mapping[str, Num] = field(default_factory=dict)
    by_resource: Mapping[str, Num] = field(default_factory=dict)

    def plus(self, other: Totals, times: Num = 1.0) -> Totals:
        """These seconds and `times` the others."""
        return Totals(
            lower_s=self.lower_s + times * other.lower_s,
            upper_s=self.upper_s + times * other.upper_s,
            by_part=_merge(self.by_part, other.by_part, times),
            by_resource=_merge(self.by_resource, other.by_resource, times),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of the mean layer, and of both ends, for one micro-batch on one rank.

    `exchange_*` holds all communication by piece, `exposed_*` what nothing hides.
    """

    forward: Totals
    backward: Totals
    embedding: Totals
    head: Totals
    exchange_forward: Mapping[str, Num]
    exchange_backward: Mapping[str, Num]
    exposed_forward: Mapping[str, Num]
    exposed_backward: Mapping[str, Num]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """What one step takes under a plan, piece by piece; all fields broadcast over the plans.

    `seconds_by_piece` adds up to `seconds`. `compute_by_resource` splits the kernels' time on
    the slowest stage by binding resource. `num_tokens` are those of one step.
    """

    rung: str
    plan: Plan
    seconds_by_piece: Mapping[str, Num]
    compute_by_resource: Mapping[str, Num]
    lower_s: Num
    upper_s: Num
    num_tokens: Num
    model_flops: Num
    peak_flops_per_s: float

    @property
    def seconds(self) -> Num:
        """The rung's answer: the sum of the pieces."""
        return sum(self.seconds_by_piece.values(), start=0.0)

    @property
    def tokens_per_s(self) -> Num:
        """Tokens of the whole cluster per second."""
        return self.num_tokens / self.seconds

    @property
    def mfu_frac(self) -> Num:
        """Model flops (no recompute, causal attention halved) over what all ranks could do."""
        return self.model_flops / (self.seconds * self.plan.num_ranks * self.peak_flops_per_s)

    @property
    def bound(self) -> str:
        """The largest piece of a single plan's step; kernels by their binding resource."""
        pieces = {k: float(v) for k, v in self.compute_by_resource.items()}
        compute = sum(pieces.values())
        others = {k: float(v) for k, v in self.seconds_by_piece.items() if k in EXCHANGE_PIECES}
        largest = max(others, key=lambda k: others[k])
        if compute >= others[largest]:
            return max(pieces, key=lambda k: pieces[k])
        return largest


EXCHANGE_PIECES = (TENSOR, CONTEXT, EXPERT, PIPELINE, BUBBLE, DATA, OPTIMIZER_STEP)


def total_seconds(nodes: Iterable[Node], *, on: Device) -> Totals:
    """Bound-rung seconds of nodes in sequence; each node's time goes to its binding resource."""
    total = Totals()
    for node in nodes:
        result = estimate(node.op, on=on)
        lower = result.lower_s
        once = Totals(
            lower_s=lower,
            upper_s=result.upper_s,
            by_part={node.part: lower},
            by_resource=_attribute(result, lower),
        )
        total = total.plus(once, node.count)
    return total


def layer_times(step: TrainStep, *, plan: Plan, on: Cluster, recipe: Recipe) -> LayerTimes:
    """Mean layer over the model's kinds, and the ends, for one micro-batch of `plan`."""
    cfg, device = step.config, on.device
    shares = {kind: count / cfg.num_layers for kind, count in cfg.kinds.items()}
    element_bytes = recipe.dtype.bytes_per_element
    forward, backward = Totals(), Totals()
    moved: tuple[dict[str, Num], ...] = ({}, {}, {})
    cores: list[Num] = [0.0, 0.0]
    for kind, share in shares.items():
        work = step.layer(kind, plan, dtype=recipe.dtype)
        passes = [total_seconds(work.select(phase=p), on=device) for p in (FORWARD, BACKWARD)]
        forward, backward = forward.plus(passes[0], share), backward.plus(passes[1], share)
        for i, phase in enumerate((FORWARD, BACKWARD)):
            core = total_seconds(filter(_is_attention, work.select(phase=phase)), on=device)
            cores[i] = cores[i] + share * core.lower_s
        for exchange in layer_exchanges(
            cfg, kind, len_seq=step.len_seq, plan=plan, element_bytes=element_bytes
        ):
            for into, seconds in zip(moved, exchange.seconds(on=on), strict=True):
                into[exchange.piece] = into.get(exchange.piece, 0.0) + share * seconds
    both = step.ends(plan, dtype=recipe.dtype)
    exposed = [_excess_over(moved[i], CONTEXT, core) for i, core in enumerate(cores)]
    return LayerTimes(
        forward=forward,
        backward=backward,
        embedding=total_seconds(both.select(part="embedding"), on=device),
        head=total_seconds((n for n in both if n.part != "embedding"), on=device),
        exchange_forward=moved[0],
        exchange_backward=_merge(moved[1], moved[2], 1.0),
        exposed_forward=exposed[0],
        exposed_backward=exposed[1],
    )


def training_step(step: TrainStep, *, plan: Plan, on: Cluster, recipe: Recipe) -> StepEstimate:
    """Bound-rung step time under one plan or an array of them; feasibility is not judged here."""
    cfg = step.config
    # Arrays of sequence lengths pair up with the plans: nothing may be reordered then.
    shapes, inverse = distinct_shapes(plan) if is_scalar(step.len_seq) else (plan, None)
    times = layer_times(step, plan=shapes, on=on, recipe=recipe)
    if inverse is not None:
        times = _take(times, inverse)
    num_micro = plan.num_micro_batches(step.global_batch)
    pipeline = _pipeline(cfg, times, plan, num_micro)
    sends_s = _sends(cfg, step.len_seq, plan, on, recipe)
    data_all, data_exposed = _data_exchange(cfg, plan, pipeline, num_micro, on, recipe)
    update = _optimizer_seconds(cfg, plan, on, recipe)
    fill_sends = 2 * (plan.pp - 1) * sends_s
    pieces = {
        **pipeline.pieces,
        PIPELINE: fill_sends,
        DATA: data_exposed,
        OPTIMIZER_STEP: update.lower_s,
    }
    exchange_s = pipeline.exchange_s + 2 * num_micro * plan.interleave * sends_s
    return StepEstimate(
        rung=BOUND,
        plan=plan,
        seconds_by_piece=pieces,
        compute_by_resource=pipeline.by_resource,
        lower_s=pipeline.compute_lower_s + update.lower_s,
        upper_s=pipeline.compute_upper_s + exchange_s + fill_sends + data_all + update.upper_s,
        num_tokens=step.num_tokens,
        model_flops=step.model_flops,
        peak_flops_per_s=on.device.matmul_rate_flops_per_s(recipe.dtype)[0],
    )


def inference_step(step: Inference, *, plan: Plan, on: Cluster, recipe: Recipe) -> StepEstimate:
    """Bound-rung seconds of one forward pass of every pipeline slot of every replica.

    `step.batch` sequences make one slot; pp slots are in flight, so that in the steady state
    every stage is busy and each sequence advances once in `seconds`: pp times the slowest stage,
    plus the sends. All dp replicas together advance dp pp batch sequences. Tensor and expert
    parallel collectives wait; the context ring hides under attention.
    """
    cfg, device = step.config, on.device
    forward, moved, exposed = Totals(), dict[str, Num](), dict[str, Num]()
    slot = replace(plan, micro_batch=step.batch)
    for kind, count in cfg.kinds.items():
        nodes, share = step.layer(kind, plan, dtype=recipe.dtype), count / cfg.num_layers
        forward = forward.plus(total_seconds(nodes, on=device), share)
        core = total_seconds(filter(_is_attention, nodes), on=device).lower_s
        once: dict[str, Num] = {}
        for exchange in layer_exchanges(
            cfg,
            kind,
            len_seq=step.len_new,
            plan=slot,
            element_bytes=recipe.dtype.bytes_per_element,
        ):
            once = _merge(once, {exchange.piece: exchange.seconds(on=on)[0]}, 1.0)
        moved = _merge(moved, once, share)
        exposed = _merge(exposed, _excess_over(once, CONTEXT, core), share)
    both = step.ends(plan, dtype=recipe.dtype)
    embedding = total_seconds(both.select(part="embedding"), on=device)
    head = total_seconds((n for n in both if n.part != "embedding"), on=device)
    has_embedding, has_head = _ends_on_slowest(embedding.lower_s, head.lower_s, plan)
    layers = ceil_div(cfg.num_layers, plan.pp)
    busy = Totals().plus(forward, layers).plus(embedding, has_embedding).plus(head, has_head)
    sends_s = plan.pp * _sends(cfg, step.len_new, slot, on, recipe)
    pieces = {part: plan.pp * s for part, s in busy.by_part.items()}
    pieces |= {piece: plan.pp * layers * s for piece, s in exposed.items()}
    pieces[PIPELINE] = sends_s
    num_tokens = plan.dp * plan.pp * step.num_tokens
    return StepEstimate(
        rung=BOUND,
        plan=plan,
        seconds_by_piece=pieces,
        compute_by_resource={r: plan.pp * s for r, s in busy.by_resource.items()},
        lower_s=plan.pp * busy.lower_s,
        upper_s=plan.pp * (busy.upper_s + layers * sum(moved.values(), start=0.0)) + sends_s,
        num_tokens=num_tokens,
        model_flops=plan.dp * plan.pp * _forward_flops(step),
        peak_flops_per_s=device.matmul_rate_flops_per_s(recipe.dtype)[0],
    )


def _forward_flops(step: Inference) -> Num:
    """Model flops of one slot: of whole prompts, or of what one more position adds to them."""
    cfg, length = step.config, step.len_context
    whole = model_flops_forward(cfg, length, length)
    if step.phase == DECODE:
        whole = whole - model_flops_forward(cfg, maximum(length - 1, 1), length - 1)
    return step.batch * whole


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


def _pipeline(cfg: TransformerConfig, times: LayerTimes, plan: Plan, num_micro: Num) -> _Pipeline:
    num_layers = ceil_div(cfg.num_layers, plan.pp)
    again = where(plan.recompute == Recompute.FULL, 1.0, 0.0)
    passes = times.forward.plus(times.forward, again).plus(times.backward)
    exposed = _merge(times.exposed_forward, times.exposed_forward, again)
    exposed = _merge(exposed, times.exposed_backward, 1.0)
    moved = _merge(times.exchange_forward, times.exchange_forward, again)
    moved = _merge(moved, times.exchange_backward, 1.0)
    layer_s = passes.lower_s + sum(exposed.values(), start=0.0)

    embedding_here, head_here = _ends_on_slowest(times.embedding.lower_s, times.head.lower_s, plan)
    extra = Totals().plus(times.embedding, embedding_here).plus(times.head, head_here)
    both_lower = times.embedding.lower_s + times.head.lower_s
    both_upper = times.embedding.upper_s + times.head.upper_s
    slowest = num_layers * layer_s + extra.lower_s
    idle_layers = (cfg.num_layers - num_layers) / plan.interleave  # the bubble waits for these
    bubble = (cfg.num_layers * layer_s + both_lower - slowest) / plan.interleave
    lower = num_layers * passes.lower_s + extra.lower_s
    upper = num_layers * passes.upper_s + extra.upper_s
    fill_lower = (cfg.num_layers * passes.lower_s + both_lower - lower) / plan.interleave
    fill_upper = (cfg.num_layers * passes.upper_s + both_upper - upper) / plan.interleave

    # Kernels that hide the context ring cannot hide gradients and weights as well.
    forward_s = times.forward.lower_s - (
        times.exchange_forward[CONTEXT] - times.exposed_forward[CONTEXT]
    )
    backward_s = times.backward.lower_s - (
        times.exchange_backward[CONTEXT] - times.exposed_backward[CONTEXT]
    )
    on_slowest = Totals().plus(passes, num_layers).plus(extra)
    parts = {part: num_micro * s for part, s in on_slowest.by_part.items()}
    redone = _merge({}, times.forward.by_part, again * num_layers * num_micro)
    parts = {part: s - redone.get(part, 0.0) for part, s in parts.items()}
    pieces = parts | {RECOMPUTED: sum(redone.values(), start=0.0)}
    pieces |= {piece: num_micro * num_layers * s for piece, s in exposed.items()}
    pieces[BUBBLE] = bubble
    return _Pipeline(
        pieces=pieces,
        by_resource={r: num_micro * s for r, s in on_slowest.by_resource.items()},
        forward_s=num_layers * forward_s,
        backward_s=num_layers * (backward_s + again * forward_s),
        exchange_s=(num_micro * num_layers + idle_layers) * sum(moved.values(), start=0.0),
        compute_lower_s=num_micro * lower + fill_lower,
        compute_upper_s=num_micro * upper + fill_upper,
    )


def _ends_on_slowest(embedding: Num, head: Num, plan: Plan) -> tuple[Num, Num]:
    """1 or 0: is the embedding, is the head on the stage that takes longest?"""
    alone = plan.pp == 1
    return (
        where(alone | (embedding > head), 1.0, 0.0),
        where(alone | (embedding <= head), 1.0, 0.0),
    )


def _sends(cfg: TransformerConfig, len_seq: Num, plan: Plan, on: Cluster, recipe: Recipe) -> Num:
    """Seconds of one activation from a stage to the next; sharded over tp along the sequence."""
    tokens = ceil_div(plan.micro_batch * ceil_div(len_seq, plan.cp), plan.tp)
    sent = Collective(
        kind="send_recv",
        num_bytes=tokens * cfg.hidden_dim * recipe.dtype.bytes_per_element,
        num_ranks=plan.pp,
    )
    return estimate_collective(sent, on=on, stride=plan.tp * plan.cp * plan.dp).lower_s


def _data_exchange(
    cfg: TransformerConfig,
    plan: Plan,
    pipeline: _Pipeline,
    num_micro: Num,
    on: Cluster,
    recipe: Recipe,
) -> tuple[Num, Num]:
    """Seconds of gradient and weight exchange: all of it, and what nothing hides."""
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
    reduces = where(plan.zero_stage >= 2, num_micro, 1.0)
    gathers = where(plan.zero_stage >= 3, num_micro, 1.0)
    again = where(plan.zero_stage >= 3, gather_s, 0.0)  # weights come back for the backward pass
    before = gathers * maximum(gather_s - pipeline.forward_s, 0.0)
    after = reduces * maximum(again + reduce_s - pipeline.backward_s, 0.0)
    return gathers * (gather_s + again) + reduces * reduce_s, before + after


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


def _optimizer_seconds(cfg: TransformerConfig, plan: Plan, on: Cluster, recipe: Recipe) -> Totals:
    """The parameter update, on a shard where ZeRO shards the optimizer."""
    sharded = plan.zero_stage >= 1
    own: Num = 0.0
    for parameters, replicas, _ in replicated_parameters(cfg, plan):
        own = own + where(sharded, ceil_div(parameters, replicas), parameters)
    nodes = optimizer(own, grad_bytes=recipe.gradient_bytes, weight_bytes=recipe.weight_bytes)
    return total_seconds(nodes, on=on.device)


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
    )


def _is_attention(node: Node) -> bool:
    """The kernel under which a ring of K and V hides."""
    return isinstance(node.op, (FlashAttention2, FlashAttention2Backward))


def _attribute(result: Estimate, lower: Num) -> dict[str, Num]:
    """`lower` under the name of the first resource that takes that long, 0 under the others."""
    shares: dict[str, Num] = {}
    left = lower
    for name, seconds in result.seconds_by_resource.items():
        shares[name] = where(seconds >= lower, left, 0.0)
        left = left - shares[name]
    return shares


def _merge(a: Mapping[str, Num], b: Mapping[str, Num], times: Num) -> dict[str, Num]:
    merged = dict(a)
    for key, value in b.items():
        merged[key] = merged.get(key, 0.0) + times * value
    return merged


def _excess_over(moved: Mapping[str, Num], piece: str, hidden_s: Num) -> dict[str, Num]:
    """`moved`, with one piece reduced to what exceeds `hidden_s`."""
    return dict(moved) | {piece: maximum(moved.get(piece, 0.0) - hidden_s, 0.0)}

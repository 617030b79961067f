"""One forward pass of serving, prefill or decode, as the sum of its pieces.

    stage    = ceil(L / p) layers and the embedding; on the last stage what is left, and the head
    seconds  = p max_i stage_i + sends

Kernels at the bound rung; what overlaps is stated at `inference_step`.
"""

from __future__ import annotations

from dataclasses import replace

from hwmodels.cluster import Cluster
from simulator.context_parallel import forward_split
from simulator.estimate import BOUND
from simulator.exchange import CONTEXT, layer_exchanges
from simulator.pieces import (
    PIPELINE,
    StepEstimate,
    Totals,
    merge,
    send_seconds,
    slowest_stage,
    slowest_stage_s,
    total_seconds,
)
from simulator.recipe import Recipe
from workloads.models.transformer import DECODE, Inference, model_flops_forward
from workloads.numeric import Num, ceil_div, maximum
from workloads.plan import Plan


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
        split = forward_split(
            cfg, list(nodes), len_seq=step.len_new, plan=slot, on=on, dtype=recipe.dtype
        )
        kernels = total_seconds(nodes, on=device).plus(split.extra)
        forward = forward.plus(kernels, share)
        once: dict[str, Num] = {}
        for exchange in layer_exchanges(
            cfg,
            kind,
            len_seq=step.len_new,
            plan=slot,
            element_bytes=recipe.dtype.bytes_per_element,
        ):
            once = merge(once, {exchange.piece: exchange.seconds(on=on)[0]}, 1.0)
        moved = merge(moved, once | {CONTEXT: split.moved}, share)
        exposed = merge(exposed, once | {CONTEXT: split.exposed}, share)
    both = step.ends(plan, dtype=recipe.dtype)
    embedding = total_seconds(both.select(part="embedding"), on=device)
    head = total_seconds((n for n in both if n.part != "embedding"), on=device)
    layer_s = forward.lower_s + sum(exposed.values(), start=0.0)
    layers, has_embedding, has_head = slowest_stage(
        cfg.num_layers, layer_s, embedding.lower_s, head.lower_s, plan
    )
    lower, upper = (
        slowest_stage_s(cfg.num_layers, layer, before, after, plan)
        for layer, before, after in (
            (forward.lower_s, embedding.lower_s, head.lower_s),
            (forward.upper_s, embedding.upper_s, head.upper_s),
        )
    )
    most = ceil_div(cfg.num_layers, plan.pp)
    busy = Totals().plus(forward, layers).plus(embedding, has_embedding).plus(head, has_head)
    sends_s = plan.pp * send_seconds(cfg, step.len_new, slot, on, recipe)
    pieces = {part: plan.pp * s for part, s in busy.by_part.items()}
    pieces |= {piece: plan.pp * layers * s for piece, s in exposed.items()}
    pieces[PIPELINE] = sends_s
    num_tokens = plan.dp * plan.pp * step.num_tokens
    return StepEstimate(
        rung=BOUND,
        plan=plan,
        seconds_by_piece=pieces,
        compute_by_resource={r: plan.pp * s for r, s in busy.by_resource.items()},
        lower_s=plan.pp * lower,
        upper_s=plan.pp * (upper + most * sum(moved.values(), start=0.0)) + sends_s,
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

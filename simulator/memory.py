"""Bytes one rank holds during a step, by part, at the fullest stage of the pipeline.

    weights, gradients, optimizer   bytes per parameter of the recipe, divided by the replicas the
                                    ZeRO stage shards over: optimizer from 1, gradients from 2,
                                    weights from 3
    gathered weights                ZeRO 3 holds two layers whole, at work and next
    layer gradients                 ZeRO 2 and 3 hold one layer's whole, as its backward pass writes
                                    it and as it is reduced and scattered: weight and gradient bytes
    activations                     what a layer keeps (none or full recompute) times its layers
                                    times the micro-batches in flight
    working set                     under full recompute, the layer being redone
    sequence exchange               chunks on their way between the ranks of a sequence
    ends                            what embedding, head and loss keep

In flight on stage i of p with v chunks: min(m, p - i) micro-batches of the whole stage under 1F1B
(v = 1), min(m v, 2 (p - i - 1) + (v - 1) p + 1) / v under the interleaved schedule (Narayanan et
al. 2021). The first stage has most of them, the last one the loss; where dense layers come before
layers with experts, a stage between them may hold more than either. The largest total is
reported; stages are filled as `parameters_per_rank` does it, with ceil(L / p) layers each, the last
one too (the step gives it what is left: memory errs on the safe side). Fused attention is assumed
(no stored scores), no dropout masks.
Source of a layer's gradients: Rajbhandari et al. 2020 (arXiv 1910.02054, section 5.2: reduced as
they become available, then released); torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py,
`foreach_reduce`: unsharded gradients copied into one flat input in the reduction's format, held
until the next layer's is there (`simulator.fsdp_memory` replays it).
Ignored: allocator fragmentation, communication buffers, the driver's context; a budget below the
capacity stands for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from simulator.context_parallel import buffer_bytes, chosen, kept_beside_bytes
from simulator.recipe import Recipe
from workloads.models.activations import ends_bytes, kv_cache_bytes, layer_bytes
from workloads.models.architecture import layers_between
from workloads.models.config import TransformerConfig
from workloads.models.experts import expert_replicas
from workloads.models.parameters import (
    StageParameters,
    layer_parameters,
    parameters_per_rank,
)
from workloads.models.transformer import Inference, TrainStep
from workloads.numeric import Num, ceil_div, maximum, minimum, where
from workloads.plan import Plan, Recompute, SequenceSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank by part; broadcasts over the plans."""

    bytes_by_part: Mapping[str, Num]

    @property
    def total(self) -> Num:
        """All parts."""
        return sum(self.bytes_by_part.values(), start=0.0)


def training_memory(step: TrainStep, *, plan: Plan, recipe: Recipe) -> MemoryEstimate:
    """The fullest pipeline stage.

    >>> from workloads.models.config import load_hf_config
    >>> from workloads.models.transformer import train_step
    >>> from simulator.recipe import RECIPES
    >>> one = train_step(load_hf_config("examples/gpt2.json"), len_seq=1024, global_batch=1)
    >>> training_memory(one, plan=Plan(), recipe=RECIPES["bf16"]).bytes_by_part["optimizer"]
    1493277696
    """
    cfg = step.config
    first, last = parameters_per_rank(cfg, plan)
    edges = ends_bytes(
        cfg, batch=plan.micro_batch, len_seq=step.len_seq, plan=plan, dtype=recipe.dtype
    )
    alone, num = plan.pp == 1, ceil_div(cfg.num_layers, plan.pp)
    kept = kept_bytes(step, plan, recipe)
    whole = Plan(
        tp=plan.tp, cp=plan.cp, ep=plan.ep, etp=plan.etp, micro_batch=plan.micro_batch,
        sequence=plan.sequence, ulysses=plan.ulysses,
    )  # fmt: skip
    redone = where(plan.recompute == Recompute.FULL, _largest(kept_bytes(step, whole, recipe)), 0.0)
    passing = buffer_bytes(cfg, len_seq=step.len_seq, plan=plan, dtype=recipe.dtype)

    def stage(index: Num, held: StageParameters, start: Num, ends: Num) -> dict[str, Num]:
        counts = layers_between(cfg, start, start + num)
        saved = sum((kept[kind] * n for kind, n in counts.items()), start=0.0)
        activations = saved * in_flight(step, plan, index)
        states = state_bytes(cfg, plan, recipe, held)
        return states | {
            "activations": activations,
            "working set": redone,
            "ends": ends,
            "sequence exchange": passing,
        }

    before = edges.embedding * in_flight(step, plan, 0) + where(alone, edges.head, 0.0)
    after = edges.head + where(alone, edges.embedding, 0.0)
    fullest = stage(0, first, 0, before)
    others = [stage(plan.pp - 1, last, cfg.num_layers - num, after)]
    for index in _interior_stages(cfg, plan):
        start = minimum(index * num, cfg.num_layers - num)
        parts = stage(index, _held_inside(cfg, plan, start), start, 0.0)
        exists = index < plan.pp - 1
        others.append({part: where(exists, held, 0.0) for part, held in parts.items()})
    for other in others:
        fuller = sum(other.values(), start=0.0) > sum(fullest.values(), start=0.0)
        fullest = {part: where(fuller, other[part], held) for part, held in fullest.items()}
    return MemoryEstimate(bytes_by_part=fullest)


def _interior_stages(cfg: TransformerConfig, plan: Plan) -> range:
    """Stages between the ends that may be the fullest.

    With layers of one kind, none: the first stage has more micro-batches in flight and the
    embedding besides. With both kinds of block, those up to the first that has MoE layers only;
    with a mixer in some layers, all of them.
    """
    if len(cfg.kinds) == 1:
        return range(0)
    if cfg.mixer is not None or cfg.moe is None:
        return range(1, int(np.max(plan.pp)) - 1)
    num_before = max(set(range(cfg.num_layers)) - set(cfg.moe.layers)) + 1
    return range(1, min(int(np.max(plan.pp)) - 1, num_before + 1))


def _held_inside(cfg: TransformerConfig, plan: Plan, start: Num) -> StageParameters:
    """Parameters of one rank of a stage without ends whose layers begin at `start`."""
    num = ceil_div(cfg.num_layers, plan.pp)
    dense: Num = 0
    experts: Num = 0
    for kind, count in layers_between(cfg, start, start + num).items():
        one = layer_parameters(cfg, kind, plan.tp, plan.ep, plan.expert_tp)
        dense, experts = dense + count * one.dense, experts + count * one.experts
    return StageParameters(dense=dense, experts=experts)


def inference_memory(step: Inference, *, plan: Plan, recipe: Recipe) -> MemoryEstimate:
    """Weights, K/V cache, and one layer's activations of a forward pass.

    `step.batch` is one pipeline slot; the pipeline keeps pp of them in flight, each with its cache.
    """
    first, last = parameters_per_rank(step.config, plan)
    cache = kv_cache_bytes(
        step.config,
        batch=step.batch,
        len_context=step.len_context,
        plan=plan,
        dtype=recipe.dtype,
    )
    kept = {
        kind: layer_bytes(
            step.config,
            kind=kind,
            batch=step.batch,
            len_seq=step.len_new,
            plan=plan,
            dtype=recipe.dtype,
        )
        for kind in step.config.kinds
    }
    return MemoryEstimate(
        bytes_by_part={
            "weights": recipe.weight_bytes * maximum(first.total, last.total),
            "kv cache": cache * plan.pp,
            "working set": _largest(kept),
        }
    )


def state_bytes(
    cfg: TransformerConfig, plan: Plan, recipe: Recipe, held: StageParameters
) -> dict[str, Num]:
    """What a rank keeps of its stage's parameters, sharded as the ZeRO stage says."""
    shard = ceil_div(held.dense, plan.dp * plan.cp)
    shard = shard + ceil_div(held.experts, expert_replicas(plan))
    layers = {
        kind: layer_parameters(cfg, kind, plan.tp, plan.ep, plan.expert_tp).total
        for kind in cfg.kinds
    }
    gathered = 2 * recipe.weight_bytes * _largest(layers)
    scattered = (recipe.weight_bytes + recipe.gradient_bytes) * _largest(layers)
    return {
        "weights": recipe.weight_bytes * where(plan.zero_stage >= 3, shard, held.total),
        "gradients": recipe.gradient_bytes * where(plan.zero_stage >= 2, shard, held.total),
        "optimizer": recipe.optimizer_bytes * where(plan.zero_stage >= 1, shard, held.total),
        "gathered weights": where(plan.zero_stage >= 3, gathered, 0.0),
        "layer gradients": where(plan.zero_stage >= 2, scattered, 0.0),
    }


def in_flight(step: TrainStep, plan: Plan, stage: Num) -> Num:
    """Micro-batches whose activations a stage holds at once, in whole stages."""
    num_micro = plan.num_micro_batches(step.global_batch)
    v, p = plan.interleave, plan.pp
    chunks = 2 * (p - stage - 1) + (v - 1) * p + 1
    interleaved = minimum(num_micro * v, chunks) / v
    return where(v > 1, interleaved, minimum(num_micro, p - stage))


def kept_bytes(step: TrainStep, plan: Plan, recipe: Recipe) -> dict[str, Num]:
    """Bytes one layer of each kind keeps for one micro-batch."""
    cfg, len_seq, dtype = step.config, step.len_seq, recipe.dtype
    writes_scores = chosen(plan, SequenceSplit.RING_SELF_ATTENTION)
    beside = kept_beside_bytes(cfg, len_seq=len_seq, plan=plan, dtype=dtype)
    found: dict[str, Num] = {}
    for kind in cfg.kinds:
        make = partial(
            layer_bytes, cfg, kind=kind, batch=plan.micro_batch, len_seq=len_seq, plan=plan,
            dtype=dtype,
        )  # fmt: skip
        found[kind] = make() + beside
        if np.any(writes_scores):
            scored = make(materialised=True)
            found[kind] = where(np.greater(writes_scores, 0), scored, found[kind])
    return found


def _largest(by_kind: Mapping[str, Num]) -> Num:
    largest: Num = 0.0
    for value in by_kind.values():
        largest = maximum(largest, value)
    return largest

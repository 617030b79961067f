"""Bytes one rank holds during a step, by part, at the fullest stage of the pipeline.

    weights, gradients, optimizer   bytes per parameter of the recipe, divided by the replicas the
                                    ZeRO stage shards over: optimizer from 1, gradients from 2,
                                    weights from 3
    gathered weights                ZeRO 3 holds two layers whole, the one at work and the next
    activations                     what a layer keeps (none or full recompute) times its layers
                                    times the micro-batches in flight
    working set                     under full recompute, the layer being redone
    ends                            what embedding, head and loss keep

In flight on stage i of p with v chunks: min(m, p - i) micro-batches of the whole stage under 1F1B
(v = 1), min(m v, 2 (p - i - 1) + (v - 1) p + 1) / v under the interleaved schedule (Narayanan et
al. 2021). The first stage has most of them, the last one the loss: both are evaluated, the larger
total is reported. Fused attention is assumed (no stored scores), no dropout masks.
Ignored: allocator fragmentation, communication buffers, the driver's context; a budget below the
device's capacity stands for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from simulator.recipe import Recipe
from workloads.models.activations import ends_bytes, kv_cache_bytes, layer_bytes
from workloads.models.config import TransformerConfig
from workloads.models.parameters import (
    LayerParameters,
    StageParameters,
    layer_parameters,
    parameters_per_rank,
)
from workloads.models.transformer import Inference, TrainStep
from workloads.numeric import Num, ceil_div, maximum, minimum, where
from workloads.plan import Plan, Recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank by part; broadcasts over the plans."""

    bytes_by_part: Mapping[str, Num]

    @property
    def total(self) -> Num:
        """All parts."""
        return sum(self.bytes_by_part.values(), start=0.0)


def training_memory(step: TrainStep, *, plan: Plan, recipe: Recipe) -> MemoryEstimate:
    """The fuller of the first and the last pipeline stage.

    >>> from workloads.models.config import load_hf_config
    >>> from workloads.models.transformer import train_step
    >>> from simulator.recipe import RECIPES
    >>> one = train_step(load_hf_config("examples/gpt2.json"), len_seq=1024, global_batch=1)
    >>> training_memory(one, plan=Plan(), recipe=RECIPES["bf16"]).bytes_by_part["optimizer"]
    1493277696.0
    """
    first, last = parameters_per_rank(step.config, plan)
    kept = _mean_layer_bytes(step, plan, recipe)
    edges = ends_bytes(
        step.config,
        batch=plan.micro_batch,
        len_seq=step.len_seq,
        plan=plan,
        dtype=recipe.dtype,
    )
    alone = plan.pp == 1
    at_first = _stage(step, plan, recipe, first, kept, 0) | {
        "ends": edges.embedding * _in_flight(step, plan, 0) + where(alone, edges.head, 0.0)
    }
    at_last = _stage(step, plan, recipe, last, kept, plan.pp - 1) | {
        "ends": edges.head + where(alone, edges.embedding, 0.0)
    }
    first_fuller = sum(at_first.values(), start=0.0) >= sum(at_last.values(), start=0.0)
    return MemoryEstimate(
        bytes_by_part={
            part: where(first_fuller, at_first[part], at_last[part]) for part in at_first
        }
    )


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
    kept = _layers_mean(
        step.config,
        lambda kind: layer_bytes(
            step.config,
            kind=kind,
            batch=step.batch,
            len_seq=step.len_new,
            plan=plan,
            dtype=recipe.dtype,
        ),
    )
    return MemoryEstimate(
        bytes_by_part={
            "weights": recipe.weight_bytes * maximum(first.total, last.total),
            "kv cache": cache * plan.pp,
            "working set": kept,
        }
    )


def _stage(
    step: TrainStep,
    plan: Plan,
    recipe: Recipe,
    held: StageParameters,
    kept: tuple[Num, Num],
    stage: Num,
) -> dict[str, Num]:
    """Parts of one stage, without the ends."""
    replicas = plan.dp * plan.cp
    expert_replicas = maximum(replicas / plan.ep, 1)

    def sharded(from_stage: int) -> Num:
        split = plan.zero_stage >= from_stage
        dense = where(split, ceil_div(held.dense, replicas), held.dense)
        return dense + where(split, ceil_div(held.experts, expert_replicas), held.experts)

    layers = ceil_div(step.config.num_layers, plan.pp)
    saved, whole = kept
    gathered = 2 * _mean_layer_parameters(step.config, plan) * recipe.weight_bytes
    return {
        "weights": recipe.weight_bytes * sharded(3),
        "gradients": recipe.gradient_bytes * sharded(2),
        "optimizer": recipe.optimizer_bytes * sharded(1),
        "gathered weights": where(plan.zero_stage >= 3, gathered, 0.0),
        "activations": saved * layers * _in_flight(step, plan, stage),
        "working set": where(plan.recompute == Recompute.FULL, whole, 0.0),
    }


def _in_flight(step: TrainStep, plan: Plan, stage: Num) -> Num:
    """Micro-batches whose activations a stage holds at once, in whole stages."""
    num_micro = plan.num_micro_batches(step.global_batch)
    v, p = plan.interleave, plan.pp
    chunks = 2 * (p - stage - 1) + (v - 1) * p + 1
    interleaved = minimum(num_micro * v, chunks) / v
    return where(v > 1, interleaved, minimum(num_micro, p - stage))


def _mean_layer_bytes(step: TrainStep, plan: Plan, recipe: Recipe) -> tuple[Num, Num]:
    """Bytes the mean layer keeps under the plan's recompute mode, and without recomputation."""

    def mean(over: Plan) -> Num:
        return _layers_mean(
            step.config,
            lambda kind: layer_bytes(
                step.config,
                kind=kind,
                batch=over.micro_batch,
                len_seq=step.len_seq,
                plan=over,
                dtype=recipe.dtype,
            ),
        )

    whole = Plan(tp=plan.tp, cp=plan.cp, ep=plan.ep, micro_batch=plan.micro_batch)
    return mean(plan), mean(whole)


def _mean_layer_parameters(cfg: TransformerConfig, plan: Plan) -> Num:
    def total(kind: str) -> Num:
        layer: LayerParameters = layer_parameters(cfg, kind, plan.tp, plan.ep)
        return layer.total

    return _layers_mean(cfg, total)


def _layers_mean(cfg: TransformerConfig, of_kind: Callable[[str], Num]) -> Num:
    """A per-layer figure averaged over the model's layer kinds."""
    total: Num = 0.0
    for kind, count in cfg.kinds.items():
        total = total + of_kind(kind) * (count / cfg.num_layers)
    return total

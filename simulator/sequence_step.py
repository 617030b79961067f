"""Seconds of a training step whose sequence lies on several ranks, or whose matrices do.

One sequence (or `batch` of them) a step over P ranks, m = 1 micro-batch:

    layer    products and maps on N / P tokens    [forward, again under recomputation, backward]
             attention under the strategy         [the same; not again where its output is kept]
             max(0, weights of a layer gathered or reduced - what the layer computes)
    step     layers + ends + Adam on a P-th of the parameters

Weights and states are sharded over the ranks (FSDP); under tensor parallelism the matrices are
split instead, heads rounded up to whole ones, and each of the two blocks gathers its input and
scatters its output: an all-reduce's bytes, waited for, again in the recomputed pass.

Full recomputation keeps a layer's input and runs its forward pass again. A strategy that keeps
attention's output (LightSeq's checkpoints, section 3.4) skips attention there. Products and maps
run as `stack` says, attention at the time of the kernels that `kernels` name: the factor fitted for
attention belongs to another kernel. Ignored: the loss of clock in long runs, stragglers, data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hwmodels.cluster import Cluster
from simulator.pieces import is_attention, total_seconds
from simulator.recipe import Recipe
from simulator.sequence_parallel import (
    Kernels,
    Network,
    attention_alone,
    attention_seconds,
)
from simulator.stack import OnDevice
from workloads.models.config import TransformerConfig
from workloads.models.parameters import count_parameters
from workloads.models.transformer import TrainStep, optimizer
from workloads.numeric import ceil_div
from workloads.ops.flash_attention import FlashAttention2
from workloads.plan import Plan
from workloads.sequence_parallel import Strategy
from workloads.workload import BACKWARD, FORWARD, Node

MAPS, ATTENTION, EXCHANGE, ENDS, ADAM = "products and maps", "attention", "exchange", "ends", "adam"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadStep:
    """How a step is run: ranks, cluster, kernels, what is recomputed.

    `recompute`: layers keep their input alone.
    """

    num_ranks: int
    on: Cluster
    recipe: Recipe
    stack: OnDevice
    kernels: Kernels
    recompute: bool = True

    @property
    def network(self) -> Network:
        """The ranks' links."""
        return Network(on=self.on, num_ranks=self.num_ranks)


def sequence_parallel_step(step: TrainStep, how: Strategy, run: SpreadStep) -> Mapping[str, float]:
    """Seconds of a step by piece, its sequences over `run.num_ranks` ranks."""
    whole = attention_of(step.config, step, run)
    forward, backward = (
        attention_seconds(how, whole, num_ranks=run.num_ranks, on=run.on, phase=phase,
                          kernels=run.kernels)
        for phase in (FORWARD, BACKWARD)
    )  # fmt: skip
    again = run.recompute and not how.keeps_output
    return spread_layers(step, run, forward.seconds * (1 + again) + backward.seconds)


def spread_layers(step: TrainStep, run: SpreadStep, attention_s: float) -> Mapping[str, float]:
    """The step around an attention that takes `attention_s` a layer, all its passes together."""
    plan = Plan(cp=run.num_ranks, micro_batch=step.global_batch)
    passes = _passes(step, plan, run)
    maps_s = passes[FORWARD] * (1 + run.recompute) + passes[BACKWARD]
    gathered = _layer_parameters(step.config) * run.recipe.weight_bytes
    # Weights come for every pass, gradients go once.
    moved_s = (3 + run.recompute) * run.network.collective("all_gather", gathered)
    layer = {
        MAPS: maps_s,
        ATTENTION: attention_s,
        EXCHANGE: max(moved_s - maps_s - attention_s, 0.0),
    }
    return _whole_step(step, plan, run, layer)


def tensor_parallel_step(step: TrainStep, run: SpreadStep) -> Mapping[str, float]:
    """The same under tensor parallelism with fused attention."""
    plan = Plan(tp=run.num_ranks, micro_batch=step.global_batch)
    passes = _passes(step, plan, run)
    core = 0.0
    for kind, count in step.config.kinds.items():
        for node in step.layer(kind, plan, dtype=run.recipe.dtype):
            if is_attention(node):
                times = 1 + (run.recompute and node.phase == FORWARD)
                seconds = attention_alone(node.op, run.on, node.phase, run.kernels)
                core += count / step.config.num_layers * times * seconds
    tokens_bytes = step.num_tokens * step.config.hidden_dim * run.recipe.dtype.bytes_per_element
    once = sum(run.network.collective(k, float(tokens_bytes)) for k in
               ("all_gather", "reduce_scatter"))  # fmt: skip
    pieces = {
        MAPS: passes[FORWARD] * (1 + run.recompute) + passes[BACKWARD],
        ATTENTION: core,
        EXCHANGE: 2 * once * (2 + run.recompute) * run.stack.factors.tensor,
    }
    return _whole_step(step, plan, run, pieces)


def attention_of(cfg: TransformerConfig, step: TrainStep, run: SpreadStep) -> FlashAttention2:
    """A layer's attention over the whole sequence."""
    spec = cfg.attention
    return FlashAttention2(
        batch=step.global_batch, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads,
        len_q=step.len_seq, head_dim=spec.head_dim, causal=True, dtype=run.recipe.dtype,
    )  # fmt: skip


def _passes(step: TrainStep, plan: Plan, run: SpreadStep) -> dict[str, float]:
    """Products and maps of the mean layer, forward and backward."""
    found = dict.fromkeys((FORWARD, BACKWARD), run.stack.factors.layer_s / 2)
    for kind, count in step.config.kinds.items():
        work = step.layer(kind, plan, dtype=run.recipe.dtype)
        for phase in found:
            nodes = (n for n in work.select(phase=phase) if not is_attention(n))
            found[phase] += count / step.config.num_layers * _seconds(nodes, run)
    return found


def _seconds(nodes: Iterable[Node], run: SpreadStep) -> float:
    return float(total_seconds(nodes, on=run.on.device, stack=run.stack).lower_s)


def _whole_step(
    step: TrainStep, plan: Plan, run: SpreadStep, layer: Mapping[str, float]
) -> Mapping[str, float]:
    """All layers, both ends, the update."""
    pieces = {name: step.config.num_layers * seconds for name, seconds in layer.items()}
    own = ceil_div(count_parameters(step.config).total, run.num_ranks)
    update = optimizer(own, grad_bytes=run.recipe.gradient_bytes,
                       weight_bytes=run.recipe.weight_bytes)  # fmt: skip
    pieces[ENDS] = _seconds(step.ends(plan, dtype=run.recipe.dtype), run)
    scale = run.stack.factors.optimizer / run.stack.factors.pointwise
    pieces[ADAM] = scale * _seconds(update, run)
    return pieces


def _layer_parameters(cfg: TransformerConfig) -> float:
    """Parameters of the mean layer."""
    ends = (1 if cfg.tied_embeddings else 2) * cfg.vocab_size * cfg.hidden_dim
    return (float(count_parameters(cfg).total) - ends) / cfg.num_layers

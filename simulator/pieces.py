"""What the steps of training and inference are made of: totals of kernels, pieces, the answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.device import Device
from simulator.estimate import BOUND, Estimate, estimate
from simulator.exchange import CONTEXT, EXPERT, TENSOR
from simulator.grouped_products import grouped_seconds
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from simulator.network import bound_seconds, calibrated_seconds
from simulator.recipe import Recipe
from simulator.stack import (
    ATTENTION,
    COUNTED_LOSS_BYTES,
    POINTWISE,
    SCORES,
    OnDevice,
    Stack,
    class_of,
)
from workloads.models.config import TransformerConfig
from workloads.numeric import Num, ceil_div, maximum, where
from workloads.op import Op
from workloads.ops.attention import StandardAttention
from workloads.ops.attention_backward import StandardAttentionBackward
from workloads.ops.collective import Collective
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.grouped_matmul import GroupedMatmul
from workloads.placement import axis_strides
from workloads.plan import Plan
from workloads.workload import Node

PIPELINE, BUBBLE, DATA = "pipeline sends", "pipeline bubble", "data parallel"
RECOMPUTED, OPTIMIZER_STEP = "recompute", "optimizer"
GAPS, STRAGGLERS = "launch gaps", "stragglers"
LOSS = "loss"
EXCHANGE_PIECES = (TENSOR, CONTEXT, EXPERT, PIPELINE, BUBBLE, DATA, OPTIMIZER_STEP)


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
            by_part=merge(self.by_part, other.by_part, times),
            by_resource=merge(self.by_resource, other.by_resource, times),
        )


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


def total_seconds(nodes: Iterable[Node], *, on: Device, stack: OnDevice | None = None) -> Totals:
    """Seconds of nodes in sequence.

    Bound rung without a `stack`, each node's time under its binding resource; with one, the time
    that its framework's kernels take, under their class.
    """
    total = Totals()
    for node in nodes:
        once = _bound(node, on) if stack is None else _in_stack(node, on, stack)
        total = total.plus(once, node.count)
    return total


def _bound(node: Node, on: Device) -> Totals:
    result = estimate(node.op, on=on, rung=BOUND)
    lower = result.lower_s
    return Totals(
        lower_s=lower,
        upper_s=result.upper_s,
        by_part={node.part: lower},
        by_resource=_attribute(result, lower),
    )


def _in_stack(node: Node, on: Device, stack: OnDevice) -> Totals:
    by_class: dict[str, Num] = {}
    passes = _passes(node, stack.stack)
    for kernel_class, seconds in stack_seconds(node.op, on=on, stack=stack):
        by_class[kernel_class] = by_class.get(kernel_class, 0.0) + passes * seconds
    whole = sum(by_class.values(), start=0.0)
    return Totals(lower_s=whole, upper_s=whole, by_part={node.part: whole}, by_resource=by_class)


def _passes(node: Node, framework: Stack) -> float:
    """How often the framework's kernels move what one kernel for the node would."""
    name, _, suffix = node.name.partition(".")
    kind = name.rpartition("_")[2]
    if kind == LOSS:
        return framework.loss_bytes / COUNTED_LOSS_BYTES
    forward, backward = framework.passes.get(kind, (1.0, 1.0))
    return {"": forward, "backward": backward}.get(suffix, 1.0)


def stack_seconds(op: Op, *, on: Device, stack: OnDevice) -> list[tuple[str, Num]]:
    """(class, seconds) of every kernel of an op as the framework runs it; see `simulator.stack`."""
    try:
        times = _remembered_times(op, on, stack.stack.attention_kernel)
    except TypeError:  # sizes are arrays, which have no hash
        times = _kernel_times(op, on, stack.stack.attention_kernel)
    return [(name, seconds * stack.factors.of(name)) for name, seconds in times]


def _kernel_times(op: Op, on: Device, attention_kernel: str) -> tuple[tuple[str, Num], ...]:
    """(class, seconds) of the op's kernels by themselves."""
    if isinstance(op, (StandardAttention, StandardAttentionBackward)):
        return tuple(
            (_in_pieces(stage.op), predict(stage.op, on=on).seconds * stage.times)
            for stage in op.stages()
        )
    kernel_class = class_of(op)
    if isinstance(op, GroupedMatmul):
        return ((kernel_class, grouped_seconds(op, on=on)),)
    label = attention_kernel if kernel_class == ATTENTION else ""
    return ((kernel_class, predict(op, on=on, conditions=Conditions(kernel=label)).seconds),)


_remembered_times = lru_cache(maxsize=2**14)(_kernel_times)


def _in_pieces(op: Op) -> str:
    """The class of a kernel of unfused attention."""
    kernel_class = class_of(op)
    return SCORES if kernel_class == POINTWISE else kernel_class


def shared_seconds(
    nodes: Sequence[Node], shares: Sequence[Num], *, on: Device, stack: OnDevice | None
) -> Totals:
    """Seconds of nodes in sequence, of each the share given."""
    total = Totals()
    for node, share in zip(nodes, shares, strict=True):
        if np.any(share):
            total = total.plus(total_seconds((node,), on=on, stack=stack), share)
    return total


def gaps(layer_s: float) -> Totals:
    """Launches and host work of a layer that no kernel hides."""
    if not layer_s:
        return Totals()
    return Totals(lower_s=layer_s, upper_s=layer_s, by_part={GAPS: layer_s},
                  by_resource={GAPS: layer_s})  # fmt: skip


def send_seconds(
    cfg: TransformerConfig,
    len_seq: Num,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    *,
    calibrated: bool = False,
) -> Num:
    """Seconds of one activation from a stage to the next; sharded over tp along the sequence."""
    tokens = ceil_div(plan.micro_batch * ceil_div(len_seq, plan.cp), plan.tp)
    sent = Collective(
        kind="send_recv",
        num_bytes=tokens * cfg.hidden_dim * recipe.dtype.bytes_per_element,
        num_ranks=plan.pp,
    )
    seconds = calibrated_seconds if calibrated else bound_seconds
    return seconds(sent, on=on, stride=axis_strides(plan).pp)


def slowest_stage(
    num_layers: int, layer_s: Num, embedding_s: Num, head_s: Num, plan: Plan
) -> tuple[Num, Num, Num]:
    """Layers of the stage that takes longest, and 1 or 0: has it the embedding, has it the head?

    Stages hold ceil(L / p) layers; the last, which has the head, what is left of them.
    """
    most = ceil_div(num_layers, plan.pp)
    last = maximum(num_layers - most * (plan.pp - 1), 0)
    alone = plan.pp == 1
    at_end = last * layer_s + head_s >= most * layer_s + embedding_s
    return (
        where(at_end, last, most),
        where(alone, 1.0, where(at_end, 0.0, 1.0)),
        where(alone, 1.0, where(at_end, 1.0, 0.0)),
    )


def slowest_stage_s(
    num_layers: int, layer_s: Num, embedding_s: Num, head_s: Num, plan: Plan
) -> Num:
    """Seconds of the stage that takes longest; see `slowest_stage`."""
    layers, has_embedding, has_head = slowest_stage(num_layers, layer_s, embedding_s, head_s, plan)
    return layers * layer_s + has_embedding * embedding_s + has_head * head_s


def is_attention(node: Node) -> bool:
    """The kernel under which a ring of K and V hides."""
    return isinstance(
        node.op,
        (FlashAttention2, FlashAttention2Backward, StandardAttention, StandardAttentionBackward),
    )


def _attribute(result: Estimate, lower: Num) -> dict[str, Num]:
    """`lower` under the name of the first resource that takes that long, 0 under the others."""
    shares: dict[str, Num] = {}
    left = lower
    for name, seconds in result.seconds_by_resource.items():
        shares[name] = where(seconds >= lower, left, 0.0)
        left = left - shares[name]
    return shares


def merge(a: Mapping[str, Num], b: Mapping[str, Num], times: Num) -> dict[str, Num]:
    """The seconds of `a` and `times` those of `b`, by name."""
    merged = dict(a)
    for key, value in b.items():
        merged[key] = merged.get(key, 0.0) + times * value
    return merged

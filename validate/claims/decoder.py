"""Whole forward passes of a decoder on the best rung, with the attention a system puts in.

    device   sum over layers of kernels (predicted one by one) + ends + 2 all-reduces a layer (tp)
    host     layers host_s_per_layer + host_s_per_step       a framework issues kernels one by one
    step     max(device, host)

The host figures belong to frameworks, not to devices: each `Framework` says where its own come
from. A framework that replays a captured graph has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hwmodels.device import Device
from hwmodels.dtypes import FP16, DType
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from workloads.models.architecture import TransformerConfig
from workloads.models.parameters import count_parameters
from workloads.models.transformer import DECODE, Inference
from workloads.op import Op
from workloads.ops.collective_transfer import CollectiveTransfer
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.flash_attention import FlashAttention2
from workloads.plan import Plan
from workloads.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """What an implementation adds to its kernels, and where the figures come from."""

    name: str
    host_s_per_layer: float = 0.0
    host_s_per_step: float = 0.0
    source: str = ""


GRAPHS = Framework(name="captured graph")

Attend = Callable[[FlashAttention2], Sequence[Op]]
"""From the attention of a layer (its shape on one rank) to the ops that a system runs instead."""


def dense(shape: FlashAttention2) -> Sequence[Op]:
    """The usual kernel: split-KV decoding for one new token, FlashAttention for a prompt."""
    if shape.len_q != 1:
        return (shape,)
    return (
        DecodeAttention(
            batch=shape.batch, num_heads=shape.num_heads, num_kv_heads=shape.kv_heads,
            len_kv=shape.len_keys, head_dim=shape.head_dim, dtype=shape.dtype,
        ),
    )  # fmt: skip


def step_seconds(
    model: TransformerConfig,
    *,
    on: Device,
    batch: int,
    len_context: int,
    phase: str = DECODE,
    attend: Attend = dense,
    tp: int = 1,
    dtype: DType = FP16,
    framework: Framework = GRAPHS,
) -> float:
    """Seconds of one forward pass of `batch` sequences: one new token each, or whole prompts.

    >>> from hwmodels import catalog
    >>> from validate.claims.models import model_named
    >>> a100 = catalog.device("a100-sxm4-80gb")
    >>> 0.006 < step_seconds(model_named("llama-2-7b"), on=a100, batch=1, len_context=512) < 0.012
    True
    """
    step = Inference(config=model, phase=phase, batch=batch, len_context=len_context)
    plan = Plan(tp=tp)
    device_s = _nodes_seconds(step.ends(plan, dtype=dtype), attend, on)
    for kind, count in model.kinds.items():
        device_s += count * _nodes_seconds(step.layer(kind, plan, dtype=dtype), attend, on)
    device_s += (
        model.num_layers
        * 2
        * all_reduce_seconds(step.num_tokens * model.hidden_dim * dtype.bytes_per_element, tp, on)
    )
    host_s = model.num_layers * framework.host_s_per_layer + framework.host_s_per_step
    return max(float(device_s), host_s)


def _nodes_seconds(nodes: Workload, attend: Attend, on: Device) -> float:
    """Every node as often as it runs, attention replaced."""
    return sum(
        float(node.count)
        * ops_seconds(attend(node.op) if isinstance(node.op, FlashAttention2) else [node.op], on)
        for node in nodes
    )


def ops_seconds(ops: Sequence[Op], on: Device, kernel: str = "") -> float:
    """Kernels one after another, as predicted."""
    run = Conditions(kernel=kernel)
    return sum(float(predict(op, on=on, conditions=run).seconds) for op in ops)


def all_reduce_seconds(num_bytes: float, ranks: int, on: Device, kernel: str = "") -> float:
    """One all-reduce over the ranks of a node; nothing for a single rank.

    `kernel` "nccl" is NCCL alone, captured in a graph; the usual one has a framework around it.
    """
    if ranks == 1:
        return 0.0
    op = CollectiveTransfer(kind="all_reduce", num_bytes=int(num_bytes), num_ranks=ranks)
    return ops_seconds([op], on, kernel)


def weight_bytes(model: TransformerConfig, dtype: DType = FP16) -> float:
    """Bytes of all parameters."""
    return count_parameters(model).total * dtype.bytes_per_element

"""What a layer's collectives cost in a framework: their times, its factor, its copies.

A tensor-parallel collective gathers or scatters the sequence. Where that is not a tensor's first
dimension (PyTorch's DTensor on a batch of more than one sequence) parts that arrive one after the
other have to be put in order: one copy of the whole, read and written once, for each of them.

What runs under kernels costs these as long as it keeps the device's own links busy: a network that
is slower than these keeps processors and memory waiting, not working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.dtypes import DType
from simulator.kernel_time.predict import predict
from simulator.layer_collective import TENSOR, Exchange
from simulator.stack import OnDevice
from workloads.numeric import Num, ceil_div, maximum, minimum, where
from workloads.ops.elementwise import Elementwise
from workloads.plan import Plan

LEAST_S: Final = 1e-30
"""Seconds that stand for none where something is divided by them."""
Times = tuple[Num, Num, Num]
"""Seconds in the forward pass, in the backward pass, and hidden in it."""


def felt_seconds(
    exchanges: Sequence[Exchange], *, plan: Plan, dtype: DType, on: Cluster, stack: OnDevice | None
) -> list[Times]:
    """Seconds of each; bound rung without a `stack`."""
    if stack is None:
        return [e.seconds(on=on) for e in exchanges]
    return [_felt(e, plan, dtype, on, stack) for e in exchanges]


def _felt(e: Exchange, plan: Plan, dtype: DType, on: Cluster, stack: OnDevice) -> Times:
    forward, backward, hidden = e.seconds(on=on, calibrated=True)
    if e.piece != TENSOR:
        return forward, backward, hidden
    factor = stack.factors.tensor
    copy_s = _copy_seconds(e, plan, dtype, on, stack)
    return (
        factor * forward + e.forward * copy_s,
        factor * backward + e.backward * copy_s,
        factor * hidden,
    )


def _copy_seconds(e: Exchange, plan: Plan, dtype: DType, on: Cluster, stack: OnDevice) -> Num:
    if not stack.stack.sequence_copies or not np.any(plan.tp > 1):
        return 0.0
    elements = maximum(e.collective.num_bytes / dtype.bytes_per_element, 1)
    op = Elementwise(num_elements=elements, vector_flops_per_element=0, dtype=dtype)
    seconds = predict(op, on=on.device).seconds * stack.factors.pointwise
    return where((plan.tp > 1) & (plan.micro_batch > 1), seconds, 0.0)


def busy_share(sent_bytes: Num, seconds: Num, on: Cluster) -> Num:
    """Of the `seconds` that a rank sends this in, the share it would take on the innermost links.

    A faster network shortens the seconds and leaves the busy ones.
    """
    inside_s = sent_bytes / on.levels[0].bytes_per_s
    return minimum(inside_s / maximum(seconds, LEAST_S), 1.0)


def wait_share(plan: Plan, on: Cluster, stack: OnDevice) -> Num:
    """Share of a step that n nodes wait for the slowest of them: jitter sqrt(2 ln n).

    The expected maximum of n normal times, to first order.
    """
    nodes = maximum(ceil_div(plan.num_ranks, on.accelerators_per_node), 1)
    share: Num = stack.factors.jitter * np.sqrt(2 * np.log(nodes))
    return share

"""Seconds of one attention layer under a sequence-parallel strategy on a cluster.

Rings go in step: a step lasts as long as the slowest rank's chunk or message,

    T = sum_t max(max_r chunk_r(t), max_r port_r(t)) + what is left to send
    port_r(t) = max(bytes that leave, bytes that come) over the rank's link inside the node, or
                over its network port

with chunks and merges by their kernel models on the shapes of the chunks, so that a contiguous
causal layout is as slow as its last rank and short chunks are as inefficient as they are. With
all-to-alls (heads) everything waits; the all-gather of states hides behind the chunk's own
attention. A hybrid is Ulysses inside groups of `inner` neighbours and a ring across the groups.

Inside a node messages take what the calibrated collectives say, across nodes `PORT_FRAC` of the
port's rate and `NET_STEP_S` a message; a rank has a port of its own. Ignored: contention of
messages with kernels for memory and SMs, and of several rings for one link.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from hwmodels.cluster import Cluster, LinkLevel
from hwmodels.errors import InputError, UnsupportedError
from simulator.kernel_time.collective import PCIE, over_cards
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from simulator.network import bound_seconds
from workloads.numeric import ceil_div
from workloads.op import Op
from workloads.ops.collective import Collective
from workloads.ops.collective_transfer import CollectiveTransfer
from workloads.ops.elementwise import add
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.linear_recurrence_backward import LinearRecurrenceBackward
from workloads.ops.linear_states import LinearStates
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.sequence_attention import RingSelfAttention
from workloads.ops.shared_prefix import CombineParts
from workloads.ops.softmax import Softmax
from workloads.ops.softmax_backward import SoftmaxBackward
from workloads.sequence_parallel import (
    HEADS,
    STATES,
    Message,
    Parcels,
    Strategy,
    assignment,
    check_ranks,
    chunk,
    messages,
    num_steps,
)
from workloads.workload import BACKWARD, FORWARD

PORT_FRAC: Final = 0.96
"""Share of a network port's rate that NCCL's own model counts on: 12 of 12.5 GB/s at 100 Gbit/s
(`net_100gbit` in hwmodels/data/nccl.toml: src/graph/topo.h)."""
PCIE_PORT_FRAC: Final = 12 / 15.754
"""Share of PCI Express that NCCL counts on for a port: 12 of the 15.754 GB/s of 16 lanes of
generation 3 (`pcie_gen3_x16` in hwmodels/data/nccl.toml: src/graph/topo.h)."""
NET_STEP_S: Final = 14e-6
"""A message across the network under the Simple protocol (`net_hop_ring_s`: NCCL's tuning.cc)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Labels of the attention kernels that an implementation runs; '' the usual one."""

    forward: str = ""
    backward: str = ""

    def of(self, phase: str) -> str:
        """The kernel of a pass."""
        return self.forward if phase == FORWARD else self.backward


USUAL: Final = Kernels()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSeconds:
    """One pass of one layer: `seconds` in all, `compute_s` of them the longest chunks.

    `sends_s` is all communication as if nothing hid it.
    """

    seconds: float
    compute_s: float
    sends_s: float

    @property
    def exposed_s(self) -> float:
        """What no kernel hides."""
        return self.seconds - self.compute_s


def attention_seconds(
    how: Strategy,
    shape: FlashAttention2,
    *,
    num_ranks: int,
    on: Cluster,
    phase: str = FORWARD,
    kernels: Kernels = USUAL,
) -> AttentionSeconds:
    """Seconds of one layer's attention over the first `num_ranks` accelerators of a cluster.

    >>> from hwmodels import catalog
    >>> from workloads.sequence_parallel import strategy
    >>> node = catalog.cluster("dgx-a100-80gb")
    >>> whole = FlashAttention2(num_heads=32, len_q=2**17, head_dim=128, causal=True)
    >>> slow, fast = (attention_seconds(strategy(name), whole, num_ranks=8, on=node).seconds
    ...               for name in ("ring_attention", "zigzag_ring"))
    >>> 1.7 < slow / fast < 2
    True
    """
    check_ranks(how, shape, num_ranks)
    net = Network(on=on, num_ranks=num_ranks)
    if how.moves == HEADS:
        return _heads(shape, num_ranks, net, phase, kernels)
    if how.moves == STATES:
        return _states(shape, num_ranks, net, phase)
    if not how.fused:
        return _unfused(shape, num_ranks, net, phase)
    return _in_steps(how, shape, num_ranks, net, phase, kernels)


def hybrid_seconds(
    how: Strategy,
    shape: FlashAttention2,
    *,
    num_ranks: int,
    inner: int,
    on: Cluster,
    phase: str = FORWARD,
    kernels: Kernels = USUAL,
) -> AttentionSeconds:
    """All-to-all inside groups of `inner` neighbours, the strategy's ring across the groups.

    A rank holds a 1 / inner share of the heads of a group's tokens (Fang and Zhao 2024, arXiv
    2405.07719). Every rank of a group sends at once through a port of its own.
    """
    if num_ranks % inner or shape.kv_heads % inner:
        raise InputError(
            f"hybrid: an inner degree of {inner} must divide {num_ranks} ranks and "
            f"{shape.kv_heads} key and value heads; give a common divisor"
        )
    groups = num_ranks // inner
    part = shape.over(num_heads=shape.num_heads // inner, num_kv_heads=shape.kv_heads // inner)
    exchanged = shape.over(len_q=shape.len_q // groups)
    heads_s = sum(Network(on=on, num_ranks=inner).all_to_alls(exchanged, phase)) if inner > 1 else 0
    if groups == 1:
        core = _kernel_seconds(of_phase(part, phase), on, kernels.of(phase))
        ring = AttentionSeconds(seconds=core, compute_s=core, sends_s=0.0)
    else:
        check_ranks(how, part, groups)
        net = Network(on=on, num_ranks=groups, stride=inner)
        ring = _in_steps(how, part, groups, net, phase, kernels)
    return AttentionSeconds(
        seconds=ring.seconds + heads_s,
        compute_s=ring.compute_s,
        sends_s=ring.sends_s + heads_s,
    )


# ---- the network ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The links between the ranks of a sequence, `stride` accelerators apart."""

    on: Cluster
    num_ranks: int
    stride: int = 1

    @property
    def per_node(self) -> int:
        """Ranks of the sequence that share the innermost links."""
        return max(int(min(self.on.levels[0].size, self.on.num_accelerators)) // self.stride, 1)

    @property
    def port(self) -> LinkLevel:
        """The level that joins nodes."""
        return self.on.level_spanning(self.num_ranks * self.stride)

    @property
    def num_nodes(self) -> int:
        """Nodes the ranks spread over."""
        return int(ceil_div(self.num_ranks, self.per_node))

    def step_seconds(self, sent: Iterable[Message]) -> float:
        """The busiest port: what leaves a rank, or comes to it, inside its node or across.

        Between cards a message to one peer is as slow as the library's kernel that writes it; two
        to different peers go at once, up to what a port of PCI Express passes.
        """
        totals: dict[tuple[int, str, bool], float] = {}
        pairs: dict[tuple[int, int], float] = {}
        for message in sent:
            across = message.source // self.per_node != message.target // self.per_node
            size = float(message.num_bytes)
            for rank, way in ((message.source, "out"), (message.target, "in")):
                key = rank, way, across
                totals[key] = totals.get(key, 0.0) + size
            if not across:
                pair = message.source, message.target
                pairs[pair] = pairs.get(pair, 0.0) + size
        largest = {a: max((b for k, b in totals.items() if k[2] == a), default=0.0)
                   for a in (False, True)}  # fmt: skip
        inside = self.inside(largest[False])
        if over_cards(min(self.num_ranks, self.per_node), self.on.device):
            bus = next(x for x in self.on.device.links if x.name == PCIE)
            port = PCIE_PORT_FRAC * bus.bytes_per_s
            one = self.inside(max(pairs.values(), default=0.0))
            inside = max(one, min(largest[False] / port, inside))
        return max(inside, self.across(largest[True]))

    def inside(self, num_bytes: float) -> float:
        """A message between neighbours of a node while all of them send."""
        return self.collective("send_recv", num_bytes, min(self.num_ranks, self.per_node))

    def across(self, num_bytes: float) -> float:
        """A message through a rank's own network port."""
        if not num_bytes:
            return 0.0
        return NET_STEP_S + num_bytes / (PORT_FRAC * self.port.bytes_per_s)

    def collective(self, kind: str, num_bytes: float, num_ranks: int | None = None) -> float:
        """A collective of the ranks, or of some on one node.

        Across nodes a ring passes every port (all-reduce, all-gather, reduce-scatter), so that
        wire bytes over all ports of a node bound it; an all-to-all sends what is addressed
        beyond the node through each rank's port.
        """
        ranks = num_ranks or self.num_ranks
        if not num_bytes or ranks == 1:
            return 0.0
        local = _calibrated(kind, num_bytes, min(ranks, self.per_node), self.on)
        if ranks <= self.per_node:
            return local
        whole, nodes = Collective(kind, num_bytes, ranks), self.num_nodes
        if kind == "all_to_all":
            beyond = num_bytes * (ranks - self.per_node) / ranks
            return max(local, self.across(beyond))
        steps = Collective(kind, num_bytes, nodes).num_steps()
        through = float(whole.wire_bytes()) / self.per_node
        inside = _calibrated(kind, num_bytes, self.per_node, self.on)
        return max(
            inside, float(steps) * NET_STEP_S + through / (PORT_FRAC * self.port.bytes_per_s)
        )

    def all_to_alls(self, shape: FlashAttention2, phase: str) -> tuple[float, float]:
        """Q, K and V there and O back; backward dO there and the three gradients back."""
        parcels = Parcels.of(shape, self.num_ranks)
        many, one = float(parcels.query + parcels.keys), float(parcels.output)
        there, back = (many, one) if phase == FORWARD else (one, many)
        return self.collective("all_to_all", there), self.collective("all_to_all", back)


def _calibrated(kind: str, num_bytes: float, num_ranks: int, on: Cluster) -> float:
    """The collective model of one node, or the bound where the device has none."""
    op = CollectiveTransfer(kind=kind, num_bytes=max(round(num_bytes), 1), num_ranks=num_ranks)
    try:
        return float(predict(op, on=on.device).seconds)
    except UnsupportedError:
        return float(bound_seconds(Collective(kind, num_bytes, num_ranks), on=on))


# ---- strategies ----------------------------------------------------------------------------


def _in_steps(
    how: Strategy,
    shape: FlashAttention2,
    num_ranks: int,
    net: Network,
    phase: str,
    kernels: Kernels,
) -> AttentionSeconds:
    """A ring's steps, every rank of each."""
    steps = range(num_steps(how, num_ranks, causal=shape.causal) + 1)
    found = [_step(how, shape, net, step, phase, kernels) for step in steps]
    return AttentionSeconds(
        seconds=sum(max(pair) for pair in found),
        compute_s=sum(compute for compute, _ in found),
        sends_s=sum(sends for _, sends in found),
    )


def step_seconds(
    how: Strategy,
    shape: FlashAttention2,
    *,
    num_ranks: int,
    on: Cluster,
    step: int,
    phase: str = FORWARD,
    kernels: Kernels = USUAL,
) -> float:
    """Seconds of one step of a ring."""
    check_ranks(how, shape, num_ranks)
    return max(_step(how, shape, Network(on=on, num_ranks=num_ranks), step, phase, kernels))


def _step(
    how: Strategy, shape: FlashAttention2, net: Network, step: int, phase: str, kernels: Kernels
) -> tuple[float, float]:
    """Seconds of the longest chunk, and of the busiest port."""
    ops = _chunks(how, shape, net.num_ranks, step)
    longest = max(
        (_chunk_seconds(op, net.on, phase, kernels, merged=step > 0) for op in ops), default=0.0
    )
    return longest, net.step_seconds(messages(how, shape, net.num_ranks, step, phase=phase))


def _chunks(
    how: Strategy, shape: FlashAttention2, num_ranks: int, step: int
) -> set[FlashAttention2]:
    """The different chunks that ranks compute in a step."""
    if step >= num_steps(how, num_ranks, causal=shape.causal):
        return set()
    works = (assignment(how, num_ranks, r, step, causal=shape.causal) for r in range(num_ranks))
    found = (chunk(how, shape, num_ranks, *work) for work in works if work)
    return {op for op in found if op is not None}


def _chunk_seconds(
    op: FlashAttention2, on: Cluster, phase: str, kernels: Kernels, *, merged: bool
) -> float:
    """A chunk's kernel, and what adds its result to those before."""
    seconds = _kernel_seconds(of_phase(op, phase), on, kernels.of(phase))
    if not merged:
        return seconds
    rows, e = op.batch * op.num_heads * op.len_q, op.dtype
    if phase == FORWARD:
        return seconds + _kernel_seconds(CombineParts(rows=rows, dim=op.head_dim, dtype=e), on)
    gradients = op.query_elements() + op.kv_elements()
    return seconds + _kernel_seconds(add(gradients, e), on)


def _heads(
    shape: FlashAttention2, num_ranks: int, net: Network, phase: str, kernels: Kernels
) -> AttentionSeconds:
    """Ulysses: everything waits for the all-to-alls."""
    part = shape.over(
        num_heads=shape.num_heads // num_ranks, num_kv_heads=shape.kv_heads // num_ranks
    )
    compute_s = _kernel_seconds(of_phase(part, phase), net.on, kernels.of(phase))
    sends_s = sum(net.all_to_alls(shape, phase))
    return AttentionSeconds(seconds=compute_s + sends_s, compute_s=compute_s, sends_s=sends_s)


def _states(shape: FlashAttention2, num_ranks: int, net: Network, phase: str) -> AttentionSeconds:
    """LASP-2: one all-gather behind the chunk's own attention; backward gathers dM the same way.

    The backward products: dQ and dM from O_inter, dK and dV from M.
    """
    op = LinearStates(
        batch=shape.batch, num_heads=shape.num_heads, len_seq=shape.len_q,
        head_dim=shape.head_dim, num_ranks=num_ranks, dtype=shape.dtype,
    )  # fmt: skip
    gather_s = net.collective("all_gather", float(op.gathered_bytes()))
    inner: Op = op.inner()
    times = {"state": 1, "outer": 1}
    if phase == BACKWARD:
        own = op.inner()
        inner = LinearRecurrenceBackward(
            batch=own.batch, num_heads=own.num_heads, len_seq=own.len_seq, key_dim=own.key_dim,
            chunk=own.chunk, dtype=own.dtype,
        )  # fmt: skip
        times = {"state": 2, "outer": 2}
    inner_s = _kernel_seconds(inner, net.on)
    rest_s = sum(
        times.get(stage.name, 1) * float(stage.times) * _kernel_seconds(stage.op, net.on)
        for stage in op.stages()
        if stage.name != "inner" and stage.times
    )
    return AttentionSeconds(
        seconds=rest_s + max(inner_s, gather_s), compute_s=rest_s + inner_s, sends_s=gather_s
    )


def _unfused(shape: FlashAttention2, num_ranks: int, net: Network, phase: str) -> AttentionSeconds:
    """Li et al.: scores written; K round, V round, backward again with their gradients reduced."""
    op = RingSelfAttention(
        batch=shape.batch, num_heads=shape.num_heads, len_seq=shape.len_q,
        head_dim=shape.head_dim, num_ranks=num_ranks, dtype=shape.dtype,
    )  # fmt: skip
    scores, softmax, output = op.parts()
    send_s = net.step_seconds(
        Message(r, (r + 1) % num_ranks, Parcels.of(op.whole(), num_ranks).keys / 2, "next", "keys")
        for r in range(num_ranks)
    )
    # Forward: scores, outputs. Backward: dP = dO V^T, dV, then dK, dQ, of the same shapes.
    rings: list[BatchedMatmul] = [scores, output]
    softmax_op: Softmax | SoftmaxBackward = softmax
    reduced_s = 0.0
    if phase == BACKWARD:
        rings = [scores, output, output, output]
        softmax_op = SoftmaxBackward(rows=softmax.rows, cols=softmax.cols, dtype=softmax.dtype)
        reduced_s = 2 * net.collective("all_reduce", float(Parcels.of(op.whole(), 1).keys) / 2)
    products = [_kernel_seconds(ring, net.on) for ring in rings]
    compute_s = num_ranks * sum(products) + _kernel_seconds(softmax_op, net.on)
    compute_s += (num_ranks - 1) * _kernel_seconds(op.addition(), net.on)
    waits = sum(max(send_s - product, 0.0) for product in products[:2])  # K and V, again backward
    return AttentionSeconds(
        seconds=compute_s + (num_ranks - 1) * waits + reduced_s,
        compute_s=compute_s,
        sends_s=2 * (num_ranks - 1) * send_s + reduced_s,
    )


def attention_alone(op: Op, on: Cluster, phase: str, kernels: Kernels) -> float:
    """Seconds of one device's attention kernel, whichever pass `op` is."""
    return _kernel_seconds(op, on, kernels.of(phase))


def of_phase(op: FlashAttention2, phase: str) -> Op:
    """The op itself, or its backward pass."""
    if phase == FORWARD:
        return op
    return FlashAttention2Backward(
        batch=op.batch, num_heads=op.num_heads, num_kv_heads=op.num_kv_heads, len_q=op.len_q,
        len_kv=op.len_kv, head_dim=op.head_dim, head_dim_v=op.head_dim_v, causal=op.causal,
        dtype=op.dtype,
    )  # fmt: skip


def _kernel_seconds(op: Op, on: Cluster, kernel: str = "") -> float:
    return float(predict(op, on=on.device, conditions=Conditions(kernel=kernel)).seconds)

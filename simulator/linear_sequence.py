"""Linear attention over ranks the other ways, to hold LASP-2 against: LASP-1, a ring of K and V.

LASP-1 (Sun et al. 2024, arXiv 2404.02882, algorithm 2) hands the running state from rank to rank:

    T = O_intra + own + (P - 1) hop,     own = O_inter + K^T V,     hop = send + O_inter + sum

for every layer: K^T V is ready before the state comes (algorithm 6 of arXiv 2502.07563), and ranks
whose weights are sharded gather them layer by layer, so that none runs ahead of the chain. Hops
within a node take its own links. Recomputed passes find the states kept, as the paper caches them.
A ring passes K and V of all ranks by every rank and turns each into a state again:

    T = O_intra + (P - 1) max(send of K and V, K^T V + O_inter)

Softmax layers of a hybrid (LASP-2H, section 3.5) gather K and V once and attend from there.
"""

from __future__ import annotations

from hwmodels.cluster import Cluster
from simulator.sequence_parallel import (
    USUAL,
    AttentionSeconds,
    Kernels,
    Network,
    attention_alone,
    attention_seconds,
    of_phase,
)
from workloads.ops.elementwise import add
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.linear_states import LinearStates
from workloads.sequence_parallel import (
    ZIGZAG,
    Message,
    Parcels,
    state_bytes,
    strategy,
    tokens_of,
)
from workloads.workload import BACKWARD, FORWARD


def passed_states_seconds(
    shape: FlashAttention2, *, num_ranks: int, on: Cluster, phase: str = FORWARD
) -> AttentionSeconds:
    """LASP-1: one pass of one layer."""
    inner_s, own_s = _parts(shape, num_ranks, on, phase)
    op = _states_of(shape, num_ranks)
    outer_s = (2 if phase == BACKWARD else 1) * attention_alone(op.outer(), on, phase, USUAL)
    elements = float(state_bytes(shape)) / shape.dtype.bytes_per_element
    sum_s = attention_alone(add(elements, shape.dtype), on, phase, USUAL)
    net = Network(on=on, num_ranks=num_ranks)
    sends_s = sum(
        net.step_seconds([Message(rank, rank + 1, float(state_bytes(shape)), "next", "state")])
        for rank in range(num_ranks - 1)
    )
    compute_s = inner_s + own_s
    chain_s = sends_s + (num_ranks - 1) * (outer_s + sum_s)
    return AttentionSeconds(seconds=compute_s + chain_s, compute_s=compute_s, sends_s=sends_s)


def passed_keys_seconds(
    shape: FlashAttention2, *, num_ranks: int, on: Cluster, phase: str = FORWARD
) -> AttentionSeconds:
    """A ring of K and V for linear attention, one layer; backward their gradients travel too."""
    inner_s, own_s = _parts(shape, num_ranks, on, phase)
    keys = float(Parcels.of(shape, num_ranks).keys) * (2 if phase == BACKWARD else 1)
    send_s = _ring_send(Network(on=on, num_ranks=num_ranks), keys)
    steps = num_ranks - 1
    return AttentionSeconds(
        seconds=inner_s + steps * max(send_s, own_s),
        compute_s=inner_s + steps * own_s,
        sends_s=steps * send_s,
    )


def gathered_keys_seconds(
    shape: FlashAttention2, *, num_ranks: int, on: Cluster, phase: str = FORWARD,
    kernels: Kernels = USUAL,
) -> AttentionSeconds:  # fmt: skip
    """LASP-2H's softmax layers: K and V gathered, then each rank's queries against them.

    Queries lie in a zigzag layout, so that every rank has the mean causal work: two blocks of
    rows, the first and the last, together as long as all keys. Backward gathers again and
    reduce-scatters dK and dV.
    """
    net = Network(on=on, num_ranks=num_ranks)
    keys = float(Parcels.of(shape, 1).keys)
    sends_s = net.collective("all_gather", keys)
    if phase == BACKWARD:
        sends_s += net.collective("reduce_scatter", keys)
    rows = shape.len_q // (2 * num_ranks)
    last = tokens_of(ZIGZAG, num_ranks, int(shape.len_q), 0)[-1] + 1
    ops = (shape.over(len_q=rows, len_kv=seen) for seen in (rows, int(last)))
    compute_s = sum(attention_alone(of_phase(op, phase), on, phase, kernels) for op in ops)
    return AttentionSeconds(seconds=sends_s + compute_s, compute_s=compute_s, sends_s=sends_s)


def hybrid_layers_seconds(
    shape: FlashAttention2, *, num_ranks: int, on: Cluster, softmax_frac: float
) -> float:
    """Forward seconds of LASP-2H's mean layer, `softmax_frac` of them softmax attention."""
    linear = attention_seconds(strategy("lasp2"), shape, num_ranks=num_ranks, on=on)
    softmax = gathered_keys_seconds(shape, num_ranks=num_ranks, on=on)
    return (1 - softmax_frac) * linear.seconds + softmax_frac * softmax.seconds


def _parts(shape: FlashAttention2, num_ranks: int, on: Cluster, phase: str) -> tuple[float, float]:
    """Seconds of a chunk's own attention, and of what its state and the sum before it take."""
    op = _states_of(shape, num_ranks)
    whole = attention_seconds(strategy("lasp2"), shape, num_ranks=num_ranks, on=on, phase=phase)
    products = (op.state(), op.outer())
    times = 2 if phase == BACKWARD else 1
    own_s = times * sum(attention_alone(p, on, phase, USUAL) for p in products)
    return whole.compute_s - own_s, own_s


def _states_of(shape: FlashAttention2, num_ranks: int) -> LinearStates:
    return LinearStates(
        batch=shape.batch, num_heads=shape.num_heads, len_seq=shape.len_q,
        head_dim=shape.head_dim, num_ranks=num_ranks, dtype=shape.dtype,
    )  # fmt: skip


def _ring_send(net: Network, num_bytes: float) -> float:
    ranks = net.num_ranks
    return net.step_seconds(
        Message(rank, (rank + 1) % ranks, num_bytes, "next", "state") for rank in range(ranks)
    )

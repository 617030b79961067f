"""Algorithms and protocols over several nodes: bytes counted rank by rank, order, choice."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from simulator import nccl
from workloads.ops.collective_rounds import simulate
from workloads.ops.collective_transfer import ClusterCollective

REACH = nccl.Reach(link=360e9, node=8 * 40e9, switch_efficiency=0.85)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv")
SHARDED = KINDS[:3]
nodes, each = st.integers(2, 12), st.sampled_from([1, 2, 4, 8])
sizes = st.integers(1, 2**34)


def op(kind: str, n: int, num_nodes: int, size: float = 2**20) -> ClusterCollective:
    return ClusterCollective(kind=kind, num_bytes=size, num_ranks=n, num_nodes=num_nodes)


# ---- bytes ---------------------------------------------------------------------------------


def ring_sends(
    kind: str, n: int, per_node: int, size: float
) -> tuple[dict[int, float], dict[int, float]]:
    """Bytes that each rank sends, and that each node sends to others, round by round."""
    sent: dict[int, float] = defaultdict(float)
    left: dict[int, float] = defaultdict(float)
    for _ in range((2 if kind == "all_reduce" else 1) * (n - 1)):
        for rank in range(n):
            target = (rank + 1) % n
            sent[rank] += size / n
            if rank // per_node != target // per_node:
                left[rank // per_node] += size / n
    return sent, left


@given(st.sampled_from(SHARDED), nodes, each)
@settings(max_examples=60, deadline=None)
def test_a_ring_conserves_bytes_per_link(kind: str, num_nodes: int, per_node: int) -> None:
    n = num_nodes * per_node
    size = 1024.0 * n
    made = op(kind, n, num_nodes, size)
    sent, left = ring_sends(kind, n, per_node, size)
    assert set(np.round(list(sent.values()), 6)) == {round(float(made.wire_bytes()), 6)}
    assert set(np.round(list(left.values()), 6)) == {round(float(made.crossing_bytes()), 6)}
    assert sum(sent.values()) == pytest.approx(n * made.wire_bytes())


@given(nodes)
@settings(max_examples=12, deadline=None)
def test_two_trees_over_the_nodes_pass_what_their_rounds_pass(num_nodes: int) -> None:
    size = 2 * num_nodes
    run = simulate("all_reduce", [np.ones(size) for _ in range(num_nodes)], "tree")
    made = op("all_reduce", num_nodes, num_nodes, size)
    assert made.crossing_bytes("tree") == max(run.sent_bytes)
    # up and down each of the two trees' edges goes half of the buffer
    assert sum(run.sent_bytes) == 2 * 2 * (num_nodes - 1) * size / 2


@given(nodes, each)
@settings(max_examples=60, deadline=None)
def test_an_all_to_all_leaves_the_node_as_its_pairs_do(num_nodes: int, per_node: int) -> None:
    n = num_nodes * per_node
    left: Counter[int] = Counter()
    for source in range(n):
        for target in range(n):
            if source // per_node != target // per_node:
                left[source // per_node] += 1  # of n parts of the buffer
    made = op("all_to_all", n, num_nodes, float(n))
    assert set(left.values()) == {round(float(made.crossing_bytes()))}


@given(nodes, each)
@settings(max_examples=40, deadline=None)
def test_a_ring_reduces_by_scattering_and_gathering(num_nodes: int, per_node: int) -> None:
    n = num_nodes * per_node
    reduced, scattered, gathered = (op(k, n, num_nodes, 1024 * n) for k in SHARDED)
    for counted in ("wire_bytes", "crossing_bytes", "num_steps", "num_rounds"):
        whole, a, b = (getattr(x, counted)() for x in (reduced, scattered, gathered))
        assert whole == pytest.approx(a + b)


def test_a_plain_send_has_one_port_and_a_group_of_whole_nodes_all() -> None:
    assert op("send_recv", 16, 2).num_ports() == 1
    assert op("all_reduce", 16, 2).num_ports() == 8
    assert op("all_reduce", 8, 8).num_ports() == 1
    assert op("all_reduce", 16, 2).over(ports_per_node=1).num_ports() == 1


def test_an_uneven_exchange_waits_for_its_busiest_rank() -> None:
    even = op("all_to_all", 16, 2, 2**30)
    uneven = even.over(skew=0.5)
    assert uneven.crossing_bytes() == 1.5 * even.crossing_bytes()
    assert uneven.wire_bytes() == 1.5 * even.wire_bytes()
    slow = nccl.best(nccl.ways(uneven, REACH)) / nccl.best(nccl.ways(even, REACH))
    assert slow == pytest.approx(1.5, rel=0.01)


# ---- order ---------------------------------------------------------------------------------


@given(st.sampled_from(KINDS), nodes, each, sizes, st.floats(1.01, 16))
@settings(max_examples=150, deadline=None)
def test_no_way_is_faster_for_more_bytes_or_slower_links(
    kind: str, num_nodes: int, per_node: int, size: int, factor: float
) -> None:
    made = op(kind, num_nodes * per_node, num_nodes, size)
    before = nccl.ways(made, REACH)
    more = nccl.ways(made.over(num_bytes=int(size * factor) + 1), REACH)
    for field in ("link", "node"):
        slower = {"link": REACH.link, "node": REACH.node} | {field: getattr(REACH, field) / factor}
        after = nccl.ways(made, nccl.Reach(**slower, switch_efficiency=0.85))
        assert all(after[way] >= s * (1 - 1e-12) for way, s in before.items())
    assert all(more[way] >= s * (1 - 1e-12) for way, s in before.items())


@given(st.sampled_from(KINDS), st.integers(2, 32), each, sizes)
@settings(max_examples=150, deadline=None)
def test_more_nodes_are_never_faster(kind: str, num_nodes: int, per_node: int, size: int) -> None:
    smaller, larger = (
        nccl.ways(op(kind, k * per_node, k, size), REACH) for k in (num_nodes, num_nodes + 1)
    )
    for way, seconds in smaller.items():
        assert larger[way] >= seconds * (1 - 1e-12), way
    assert nccl.best(larger) >= nccl.best(smaller) * (1 - 1e-12)


@given(st.sampled_from(KINDS), nodes, each, sizes)
@settings(max_examples=100, deadline=None)
def test_the_chosen_way_is_the_fastest(kind: str, num_nodes: int, per_node: int, size: int) -> None:
    found = nccl.ways(op(kind, num_nodes * per_node, num_nodes, size), REACH)
    assert found[nccl.chosen(found)] == min(found.values()) == nccl.best(found)


# ---- choice --------------------------------------------------------------------------------


def choice(num_nodes: int, size: int, reach: nccl.Reach = REACH) -> nccl.Way:
    return nccl.chosen(nccl.ways(op("all_reduce", 8 * num_nodes, num_nodes, size), reach))


def test_trees_and_flags_are_for_small_messages_and_rings_for_large_ones() -> None:
    assert choice(8, 2**12) == (nccl.TREE, nccl.LL)
    assert choice(8, 2**21) == (nccl.TREE, nccl.LL128)
    assert choice(8, 2**34) == (nccl.RING, nccl.SIMPLE)
    assert choice(2, 2**30) == (nccl.NVLS_TREE, nccl.SIMPLE)  # half of a ring's bytes leave a node


def test_without_a_switch_or_nvlink_some_ways_are_missing() -> None:
    made = op("all_reduce", 16, 2)
    plain = nccl.ways(made, nccl.Reach(link=1e11, node=1e11))
    assert (nccl.NVLS_TREE, nccl.SIMPLE) not in plain
    cards = nccl.ways(made, nccl.Reach(link=1e11, node=1e11, over_pcie=True))
    assert {protocol for _, protocol in cards} == {nccl.LL, nccl.SIMPLE}
    integers = nccl.ways(made, REACH, may_reduce=False)
    assert (nccl.NVLS_TREE, nccl.SIMPLE) not in integers
    assert {way for way, _ in nccl.ways(op("all_gather", 16, 2), REACH)} == {nccl.RING}
    assert {way for way, _ in nccl.ways(op("all_to_all", 16, 2), REACH)} == {nccl.DIRECT}


def test_a_large_ring_runs_at_the_ports_rate_and_a_small_tree_at_its_steps() -> None:
    table = catalog.nccl_constants()
    large = nccl.ways(op("all_reduce", 32, 4, 2**36), REACH)[nccl.RING, nccl.SIMPLE]
    assert large == pytest.approx(2 * 31 / 32 * 2**36 / REACH.node, rel=0.01)
    small = nccl.ways(op("all_reduce", 32, 4, 64), REACH)[nccl.TREE, nccl.LL]
    steps = 2 * 7 * 1.8 * table["nvlink_hop_tree_s"][0] + 2 * 2 * table["net_hop_tree_s"][0]
    assert small == pytest.approx(table["base_latency_tree_s"][0] + steps, rel=0.01)


def test_the_switch_starts_at_the_rank_count_that_measurements_show() -> None:
    for device, system in (("h200-sxm", "hgx-h200"), ("b200-sxm", "hgx-b200")):
        tables = [m for m in catalog.cluster(system).measured if m["kind"] == "all_reduce_by_ranks"]
        ranks = np.array(tables[0]["ranks"])
        gained = np.array(tables[0]["busbw_bytes_per_s"]) / np.array(
            tables[0]["busbw_without_nvls_bytes_per_s"]
        )
        first = nccl.first_switched_rank(nccl.switch_efficiency(catalog.device(device)))
        assert first == ranks[gained > 1.02].min()
    assert nccl.first_switched_rank(0.0) > 2**30


def test_sizes_may_be_arrays() -> None:
    size = 2.0 ** np.arange(10, 34)
    many = nccl.ways(op("all_reduce", 32, 4).over(num_bytes=size), REACH)
    for i in (0, 11, 23):
        one = nccl.ways(op("all_reduce", 32, 4, int(size[i])), REACH)
        for way, seconds in one.items():
            assert np.asarray(many[way])[i] == pytest.approx(seconds, rel=1e-12)

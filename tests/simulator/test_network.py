"""Collectives on link levels: rings by hand, and against ranks that are placed and counted."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.cluster import Cluster
from hwmodels.errors import UnsupportedError
from simulator.network import estimate_collective
from workloads.ops.collective import KINDS, Collective

A100, H100 = catalog.cluster("dgx-a100-80gb", nodes=8), catalog.cluster("hgx-h100", nodes=8)
NVLINK, NIC = 300e9, 25e9  # bytes/s of one A100, per direction
SIZE = 5040 * 2**10  # divisible by every group size below


def by_level(kind: str, n: int, *, on: Cluster = A100, stride: int = 1, size: float = SIZE):  # type: ignore[no-untyped-def]
    made = Collective(kind=kind, num_bytes=size, num_ranks=n)
    return estimate_collective(made, on=on, stride=stride)


# ---- one level by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all_reduce", lambda n: 2 * (n - 1) / n),
        ("all_gather", lambda n: (n - 1) / n),
        ("reduce_scatter", lambda n: (n - 1) / n),
        ("all_to_all", lambda n: (n - 1) / n),
        ("broadcast", lambda n: float(n > 1)),
        ("send_recv", lambda n: float(n > 1)),
    ],
)
def test_a_ring_inside_the_node(kind: str, sent, n: int) -> None:  # type: ignore[no-untyped-def]
    e = by_level(kind, n)
    assert e.lower_s == pytest.approx(sent(n) * SIZE / NVLINK, rel=1e-12, abs=0)
    assert e.lower_s == e.upper_s == e.seconds


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_needs_no_time(kind: str) -> None:
    for on in (A100, H100, catalog.cluster("gb200-nvl72", nodes=36)):
        assert by_level(kind, 1, on=on).upper_s == 0
        assert by_level(kind, 1, on=on, stride=8).upper_s == 0


# ---- against placed ranks ------------------------------------------------------------------


class Placed:
    """Ranks on nodes of `per_node` accelerators; counts what each accelerator sends per level."""

    def __init__(self, n: int, stride: int, per_node: int) -> None:
        self.nodes = [rank * stride // per_node for rank in range(n)]
        self.n = n
        self.sent: dict[str, Counter[int]] = {"inside": Counter(), "outside": Counter()}

    def send(self, source: int, target: int, num_bytes: float) -> None:
        inside = self.nodes[source] == self.nodes[target]
        self.sent["inside" if inside else "outside"][source] += num_bytes

    def most(self, level: str) -> float:
        return max(self.sent[level].values(), default=0.0)

    def groups(self) -> list[list[int]]:
        """Ranks by node."""
        return [[r for r in range(self.n) if self.nodes[r] == k] for k in sorted(set(self.nodes))]

    def ring(self, ranks: list[int], chunk_bytes: float) -> None:
        """len - 1 steps of a ring, each rank passing a chunk to the next."""
        for _ in range(len(ranks) - 1):
            for i, rank in enumerate(ranks):
                self.send(rank, ranks[(i + 1) % len(ranks)], chunk_bytes)

    def hierarchical(self, kind: str, size: float) -> None:
        """Reduce-scatter inside, all-reduce among equals of all nodes, all-gather inside."""
        groups = self.groups()
        m = len(groups[0])
        across = [list(equals) for equals in zip(*groups, strict=True)]
        for ranks in groups:
            for _ in range(2 if kind == "all_reduce" else 1):
                self.ring(ranks, size / m)
        for ranks in across:
            for _ in range(2 if kind == "all_reduce" else 1):
                self.ring(ranks, size / m / len(ranks))


CASES = [(n, s) for s in (1, 2, 4, 8, 16) for n in (2, 4, 8, 16, 32) if n * s <= 64]


@pytest.mark.parametrize(("n", "stride"), CASES)
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_hierarchies_move_what_placed_ranks_move(kind: str, n: int, stride: int) -> None:
    ranks = Placed(n, stride, 8)
    ranks.hierarchical(kind, SIZE)
    e = by_level(kind, n, stride=stride)
    assert e.seconds_by_level["nvlink"] == pytest.approx(ranks.most("inside") / NVLINK, rel=1e-12)
    outside = e.seconds_by_level["infiniband_hdr"]
    assert outside == pytest.approx(ranks.most("outside") / NIC, rel=1e-12)


@pytest.mark.parametrize(("n", "stride"), CASES)
def test_all_to_all_moves_what_pairs_move(n: int, stride: int) -> None:
    ranks = Placed(n, stride, 8)
    for source in range(n):
        for target in range(n):
            if source != target:
                ranks.send(source, target, SIZE / n)
    e = by_level("all_to_all", n, stride=stride)
    assert e.seconds_by_level["nvlink"] == pytest.approx(ranks.most("inside") / NVLINK, rel=1e-12)
    outside = e.seconds_by_level["infiniband_hdr"]
    assert outside == pytest.approx(ranks.most("outside") / NIC, rel=1e-12)


@pytest.mark.parametrize(("n", "stride"), CASES)
def test_a_shifted_ring_is_as_slow_as_its_slowest_hop(n: int, stride: int) -> None:
    """A ring that leaves the node anywhere waits for that hop at every step."""
    ranks = Placed(n, stride, 8)
    for source in range(n):
        ranks.send(source, (source + 1) % n, SIZE)
    e = by_level("send_recv", n, stride=stride)
    slowest = max(ranks.most("inside") / NVLINK, ranks.most("outside") / NIC)
    assert e.lower_s == pytest.approx(slowest, rel=1e-12)


def test_three_levels_share_the_buffer_level_by_level() -> None:
    """512 H100s: 8 by NVLink, 32 nodes to a leaf, 2 leaves to the spine; NVLS inside the node."""
    on = catalog.cluster("dgx-h100", nodes=64)
    e = by_level("all_reduce", 512, on=on)
    inside, leaf, spine = e.seconds_by_level.values()
    assert inside == pytest.approx(SIZE * 9 / 8 / 450e9, rel=1e-12)
    assert leaf == pytest.approx(2 * 31 / 32 * SIZE / 8 / 50e9, rel=1e-3)
    assert spine == pytest.approx(2 * 1 / 2 * SIZE / 256 / 50e9, rel=1e-3)
    assert e.lower_s == max(inside, leaf + spine), "one port carries leaf and spine"
    assert e.upper_s == pytest.approx(inside + leaf + spine, rel=1e-12)


# ---- where ranks lie -----------------------------------------------------------------------


def test_data_parallel_groups_beside_tensor_parallel_ones_see_one_nic() -> None:
    """tp = 8 fills the node: the eight replicas meet on one NIC each; whole nodes share eight."""
    strided = by_level("all_reduce", 8, stride=8)
    assert strided.seconds_by_level["nvlink"] == 0
    assert strided.lower_s == pytest.approx(2 * 7 / 8 * SIZE / NIC, rel=1e-12)
    whole = by_level("all_reduce", 64)
    assert whole.seconds_by_level["infiniband_hdr"] == pytest.approx(
        2 * 7 / 8 * SIZE / 8 / NIC, rel=1e-12
    )


def test_gb200_is_one_domain_of_72() -> None:
    on = catalog.cluster("gb200-nvl72", nodes=36)
    inside = by_level("all_gather", 72, on=on)
    assert inside.seconds_by_level == {
        "nvlink": pytest.approx(71 / 72 * SIZE / 900e9, rel=1e-12),
        "inter_rack": 0,
    }
    racks = by_level("all_gather", 144, on=on)
    assert racks.seconds_by_level["inter_rack"] == pytest.approx(
        SIZE / 72 / 2 / 50e9 + 5e-6, rel=1e-12
    )
    assert by_level("send_recv", 2, on=on, stride=72).lower_s == pytest.approx(
        SIZE / 50e9 + 5e-6, rel=1e-12
    )


def test_the_switch_reduces_where_that_is_less() -> None:
    for n in (2, 4, 8):
        expected = min(2 * (n - 1) / n, (n + 1) / n) * SIZE / 450e9
        assert by_level("all_reduce", n, on=H100).lower_s == pytest.approx(expected, rel=1e-12)
    gathered = by_level("all_gather", 8, on=H100).lower_s
    assert gathered == pytest.approx(7 / 8 * SIZE / 450e9, rel=1e-12)


def with_latency(on: Cluster, latency_s: float) -> Cluster:
    inner = replace(on.levels[0], latency_s=latency_s)
    return replace(on, levels=(inner, *on.levels[1:]))


def test_steps_cost_a_latency_each_and_the_switch_takes_two() -> None:
    for on, steps in ((A100, 14), (H100, 2)):
        slower = by_level("all_reduce", 8, on=with_latency(on, 1e-3)).lower_s
        assert slower - by_level("all_reduce", 8, on=on).lower_s == pytest.approx(steps * 1e-3)
    for kind, steps in (("all_gather", 7), ("send_recv", 1), ("all_to_all", 1)):
        slower = by_level(kind, 8, on=with_latency(A100, 1e-3)).lower_s
        assert slower - by_level(kind, 8).lower_s == pytest.approx(steps * 1e-3)


def test_oversubscription_divides_the_bandwidth() -> None:
    outer = replace(A100.levels[1], oversubscription=2.0)
    slow = replace(A100, levels=(A100.levels[0], outer))
    for kind in KINDS:
        double = by_level(kind, 8, on=slow, stride=8).lower_s
        assert double == pytest.approx(2 * by_level(kind, 8, stride=8).lower_s, rel=1e-12)


def test_ranks_beyond_the_widest_link_are_refused() -> None:
    """HGX H800 has no network of its own: NVLink must not stand in for it."""
    on = catalog.cluster("hgx-h800")
    assert by_level("all_reduce", 8, on=on).lower_s > 0
    with pytest.raises(UnsupportedError, match="joins 8 accelerators at its widest level, nvlink"):
        by_level("all_reduce", 16, on=on)
    with pytest.raises(UnsupportedError, match="send_recv spans 16"):
        by_level("send_recv", 2, on=on, stride=8)


# ---- properties ----------------------------------------------------------------------------

kinds = st.sampled_from(KINDS)
clusters = st.sampled_from(["dgx-a100-80gb", "hgx-h100", "gb200-nvl72", "dgx-h100"])


@settings(max_examples=60, deadline=None)
@given(
    kind=kinds,
    name=clusters,
    n=st.integers(1, 512),
    stride=st.sampled_from([1, 2, 8, 24]),
    size=st.integers(0, 2**34),
    more=st.integers(0, 2**34),
)
def test_more_bytes_never_travel_faster(
    kind: str, name: str, n: int, stride: int, size: int, more: int
) -> None:
    on = catalog.cluster(name, nodes=512)
    less_e = by_level(kind, n, on=on, stride=stride, size=size)
    more_e = by_level(kind, n, on=on, stride=stride, size=size + more)
    assert 0 <= less_e.lower_s <= less_e.upper_s
    assert less_e.lower_s <= more_e.lower_s
    assert less_e.upper_s <= more_e.upper_s
    faster = replace(on, levels=tuple(replace(x, bytes_per_s=2 * x.bytes_per_s) for x in on.levels))
    assert by_level(kind, n, on=faster, stride=stride, size=size).lower_s <= less_e.lower_s


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_more_ranks_never_finish_earlier(kind: str, stride: int) -> None:
    """Groups that double; the switch is left out, whose (n + 1) / n falls with n."""
    sizes = [2**i for i in range(10)]
    lower = [by_level(kind, n, on=catalog.cluster("dgx-a100-80gb", 512), stride=stride).lower_s
             for n in sizes]  # fmt: skip
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(lower)), lower


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dgx-h100", "gb200-nvl72", "tpu-v4-pod"])
def test_arrays_agree_with_scalars(kind: str, name: str) -> None:
    on = catalog.cluster(name, nodes=128)
    rng = np.random.default_rng(5)
    n = 2.0 ** rng.integers(0, 6, 40)
    stride = 2.0 ** rng.integers(0, 4, 40)
    size = np.round(2 ** rng.uniform(0, 33, 40))
    made = Collective(kind=kind, num_bytes=size, num_ranks=n)
    many = estimate_collective(made, on=on, stride=stride)
    for i in range(40):
        one = by_level(kind, int(n[i]), on=on, stride=int(stride[i]), size=int(size[i]))
        assert np.asarray(many.lower_s)[i] == pytest.approx(one.lower_s, rel=1e-12, abs=0)
        assert np.asarray(many.upper_s)[i] == pytest.approx(one.upper_s, rel=1e-12, abs=0)


def test_the_rail_of_a_strided_group_is_counted_once() -> None:
    """No stride makes a level faster than its own link: the time of one NIC is the floor."""
    for stride in (8, 16, 24, 64):
        e = by_level("all_gather", 8, on=catalog.cluster("dgx-a100-80gb", 64), stride=stride)
        assert e.lower_s == pytest.approx(7 / 8 * SIZE / NIC, rel=1e-12)
        assert not math.isclose(e.lower_s, 0)


def test_groups_that_straddle_nodes_are_as_slow_as_the_worst() -> None:
    """Threes over nodes of eight: ranks 6, 7 and 8 meet over the network; on one node none do."""
    one_node = catalog.cluster("hgx-h100")
    for n in (3, 5, 6, 7):
        inside = by_level("all_reduce", n, on=one_node)
        across = by_level("all_reduce", n, on=H100)
        assert inside.seconds_by_level["infiniband_ndr"] == 0
        assert across.seconds_by_level["infiniband_ndr"] > 5 * inside.lower_s
    # Twelve on eights: fours are together everywhere, three of them meet over the network.
    twelve = by_level("all_gather", 12, on=H100)
    assert twelve.seconds_by_level["nvlink"] == pytest.approx(3 / 4 * SIZE / 450e9)
    assert twelve.seconds_by_level["infiniband_ndr"] == pytest.approx(2 / 3 * SIZE / 4 / 50e9)
    many = by_level("all_gather", np.array([3.0, 8.0, 12.0]), on=H100).lower_s
    assert many[2] == twelve.lower_s

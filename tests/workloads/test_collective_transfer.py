"""Collectives as ops: against the executed ring, nodes, and the exchange of routed tokens."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError, UnknownNameError
from workloads.ops.collective_rounds import shard_lengths, simulate
from workloads.ops.collective_transfer import (
    KINDS,
    ClusterCollective,
    CollectiveTransfer,
    CustomAllReduce,
)
from workloads.ops.expert_exchange import ExpertExchange

ROUTED = {"num_tokens": 300, "hidden": 64, "topk": 4, "num_experts": 64, "num_ranks": 8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_counts_are_those_of_the_executed_collective(kind: str, num_ranks: int) -> None:
    total = 24 * num_ranks
    lengths = shard_lengths(total, num_ranks) if kind == "all_gather" else [total] * num_ranks
    done = simulate(kind, [np.ones(n) for n in lengths])
    op = CollectiveTransfer(kind=kind, num_bytes=total, num_ranks=num_ranks)
    assert op.wire_bytes() == max(done.sent_bytes) and op.num_steps() == done.num_steps
    given, got = (max(b.size for b in side) for side in ([np.ones(n) for n in lengths],
                                                        done.results))  # fmt: skip
    assert op.compulsory_bytes() == op.work(0.0).bytes == given + got


def test_reductions_add_what_the_other_ranks_hold() -> None:
    op = CollectiveTransfer(kind="all_reduce", num_bytes=4 * 1000, num_ranks=4, dtype=FP32)
    assert op.work(0.0).vector_flops == 1000 * 3 / 4  # each rank sums its quarter of 4 buffers
    assert CollectiveTransfer(kind="all_gather", num_bytes=8, num_ranks=4).work(0).vector_flops == 0


def test_frameworks_kernels_read_buffers_or_parts_of_them() -> None:
    op = CustomAllReduce(num_bytes=800, num_ranks=8)
    assert (op.one_shot_bytes(), op.two_shot_bytes()) == (7 * 800, 2 * 7 * 100)
    with pytest.raises(UnknownNameError, match="all_reduce"):
        CustomAllReduce(kind="all_gather", num_bytes=8, num_ranks=2)


def test_nodes_are_crossed_by_rings_and_by_what_is_addressed_beyond() -> None:
    ring = ClusterCollective(kind="all_gather", num_bytes=1600, num_ranks=16, num_nodes=2)
    assert (ring.num_rounds(), ring.crossing_bytes()) == (1, 1500)
    apart = ClusterCollective(kind="all_to_all", num_bytes=1600, num_ranks=16, num_nodes=2)
    assert apart.crossing_bytes() == 8 * 1600 / 2  # eight ranks of a node, half of each buffer
    assert ClusterCollective(num_bytes=1600, num_ranks=8, num_nodes=1).crossing_bytes() == 0
    with pytest.raises(InputError, match="num_nodes"):
        ClusterCollective(num_bytes=1, num_ranks=2, num_nodes=4)


@pytest.mark.parametrize("low_latency", [False, True])
def test_copies_are_those_of_tokens_routed_at_random(low_latency: bool) -> None:
    rng = np.random.default_rng(5)
    ranks = rng.integers(0, 8, size=(200_000, 4))  # of each choice; rank 0 is home
    if low_latency:
        sent = (ranks != 0).sum(axis=1).mean()
    else:
        sent = np.mean([(ranks == r).any(axis=1).mean() for r in range(1, 8)]) * 7
    op = ExpertExchange(**ROUTED, low_latency=low_latency)
    assert op.copies() == pytest.approx(sent, rel=0.01)
    assert op.wire_bytes() == pytest.approx(300 * 64 * 2 * op.copies())


def test_an_exchange_moves_tokens_once_on_one_side_and_copies_on_the_other() -> None:
    out = ExpertExchange(**ROUTED, dtype=FP8)
    back = ExpertExchange(**ROUTED, direction="combine", dtype=BF16)
    assert out.work(0.0).read_bytes == 300 * 64 == out.compulsory_bytes()
    assert out.work(0.0).write_bytes == out.wire_bytes() and out.work(0.0).vector_flops == 0
    assert back.work(0.0).write_bytes == 300 * 64 * 2
    assert back.work(0.0).vector_flops == pytest.approx(300 * 64 * back.copies())
    assert out.crossing_bytes() == 0
    assert out.over(num_nodes=2).node_copies() == 1 - 0.5**4


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"direction": "sideways"}, "direction"), ({"topk": 65}, "topk"), ({"num_nodes": 9}, "nodes")],
)
def test_exchanges_that_make_no_sense_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ExpertExchange(**{**ROUTED, **changes})  # type: ignore[arg-type]

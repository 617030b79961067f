"""Collectives: protocols by size, links, ranks, sockets, switches, networks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, INT8
from hwmodels.errors import InputError, UnknownNameError, UnsupportedError
from simulator.kernel_time import collective, collective_nodes, expert_exchange
from simulator.kernel_time.model import USUAL
from simulator.kernel_time.rates import rates_of
from workloads.ops.collective_transfer import (
    KINDS,
    ClusterCollective,
    CollectiveTransfer,
    CustomAllReduce,
    StagedCollective,
)
from workloads.ops.expert_exchange import ExpertExchange

A100, H100 = catalog.device("a100-sxm4-80gb"), catalog.device("h100-sxm")
SIZES = 2.0 ** np.arange(8, 33)


def seconds(op: Any, device: Any = H100) -> Any:
    model = next(m for m in MODELS if type(op) in m.ops)
    return model.time(op, rates_of(device), model.nominal(), USUAL).seconds


MODELS = (
    collective.MODEL,
    collective.CUSTOM,
    collective_nodes.CLUSTER,
    collective_nodes.STAGED,
    expert_exchange.EXPERTS,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_times_rise_with_bytes(kind: str, num_ranks: int) -> None:
    op = CollectiveTransfer(kind=kind, num_bytes=SIZES, num_ranks=num_ranks)
    assert (np.diff(seconds(op)) > 0).all()


def test_large_messages_run_at_the_links_rate_and_small_ones_at_the_steps() -> None:
    values = collective.MODEL.nominal()
    link = 300e9  # A100's NVLink, per direction; its switch does not reduce
    large = CollectiveTransfer(kind="all_reduce", num_bytes=2.0**36, num_ranks=8)
    wire = 2**36 / 8 * (14 + values["start"])
    expected = wire / (values["simple_frac"] * link)
    assert seconds(large, A100) == pytest.approx(expected, rel=0.02)
    small = large.over(num_bytes=512.0)
    expected = values["launch_s"] + 14 * values["ll_step_s"]
    assert seconds(small, A100) == pytest.approx(expected, rel=0.02)


def test_a_switch_that_adds_is_used_for_large_sums_of_floating_numbers_only() -> None:
    op = CollectiveTransfer(kind="all_reduce", num_bytes=2.0**30, num_ranks=8)
    assert seconds(op) < 0.9 * seconds(op.over(dtype=INT8))
    two = op.over(num_ranks=2)
    assert seconds(two) == seconds(two.over(dtype=INT8))
    gather = dataclasses.replace(op, kind="all_gather")
    assert seconds(gather) == seconds(gather.over(dtype=INT8))


def test_cards_talk_over_pci_express_beyond_pairs() -> None:
    op = CollectiveTransfer(kind="all_gather", num_bytes=2.0**28, num_ranks=4)
    cards, board = catalog.device("h100-pcie"), H100
    assert seconds(op, cards) > 4 * seconds(op, board)
    rtx = catalog.device("rtx-pro-6000-blackwell-server")
    per_byte = [float(seconds(op.over(num_ranks=n), rtx)) for n in (4, 8)]
    assert per_byte[1] > 1.3 * per_byte[0]  # the second socket


def test_rings_between_two_roots_pass_what_joins_these() -> None:
    """DeepBench's P100: rings of 2, 4 and 8 cards all pass 6 GB/s, which is QPI's rate."""
    card = catalog.device("p100-pcie-16gb")
    for n in (2, 4, 8):
        op = CollectiveTransfer(kind="all_reduce", num_bytes=2**30, num_ranks=n)
        joined = seconds(op.over(root_bytes_per_s=6e9), card)
        assert op.wire_bytes() / joined == pytest.approx(6e9, rel=0.25)
        assert seconds(op, card) < joined
    board = CollectiveTransfer(kind="all_reduce", num_bytes=2**30, num_ranks=8)
    assert seconds(board) == seconds(board.over(root_bytes_per_s=6e9))  # NVLink passes no root


def test_custom_kernels_win_where_messages_are_small() -> None:
    own = seconds(CustomAllReduce(num_bytes=SIZES, num_ranks=8), A100)
    ring = seconds(CollectiveTransfer(kind="all_reduce", num_bytes=SIZES, num_ranks=8), A100)
    assert own[0] < ring[0]
    assert own[-1] == pytest.approx(ring[-1], rel=0.2)
    with pytest.raises(UnknownNameError, match="all_reduce"):
        CustomAllReduce(kind="all_gather", num_bytes=1, num_ranks=2)


def test_nodes_add_their_network() -> None:
    many = ClusterCollective(kind="all_reduce", num_bytes=SIZES, num_ranks=16, num_nodes=2)
    one = CollectiveTransfer(kind="all_reduce", num_bytes=SIZES, num_ranks=16)
    assert (seconds(many) > seconds(one)).all()
    assert (seconds(many) < seconds(many.over(num_nodes=16))).all()
    with pytest.raises(InputError, match="num_nodes"):
        ClusterCollective(kind="all_reduce", num_bytes=1, num_ranks=2, num_nodes=4)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="all_reduce"):
        CollectiveTransfer(kind="all_reduc", num_bytes=1, num_ranks=2)
    lonely = dataclasses.replace(H100, links=())
    with pytest.raises(UnsupportedError, match="link"):
        seconds(CollectiveTransfer(num_bytes=1, num_ranks=2, dtype=BF16), lonely)


# ---- several nodes, through host memory -----------------------------------------------------


def staged(size: float, n: int, nodes: int, **more: Any) -> StagedCollective:
    return StagedCollective(num_bytes=size, num_ranks=n, num_nodes=nodes, **more)


def test_a_large_message_uses_as_many_paths_as_the_node_has_switches() -> None:
    size = 2**40
    rate = [
        2 * (n - 1) / n * size / float(seconds(staged(size, n, 2), A100)) for n in (2, 4, 8, 16)
    ]
    assert rate[1] == pytest.approx(2 * rate[0], rel=0.01)
    assert rate[2] == pytest.approx(4 * rate[0], rel=0.01)
    assert rate[3] == pytest.approx(4 * rate[0], rel=0.01)  # eight ranks share four ways
    one = collective_nodes.STAGED.nominal()["stage_frac"] * 31.5e9
    assert rate[0] == pytest.approx(one, rel=0.01)


def test_a_message_through_sockets_slows_down_beyond_its_buffers() -> None:
    whole = [float(seconds(staged(s, 2, 2, sockets=True), A100)) for s in (2**20, 2**30)]
    plain = [float(seconds(staged(s, 2, 2), A100)) for s in (2**20, 2**30)]
    assert whole[0] == plain[0]
    values = collective_nodes.STAGED.nominal()
    wire = values["wire_frac"] * 50e9
    assert whole[1] == pytest.approx(max(2**30 / wire, plain[1]), rel=0.05)


def test_ports_bound_what_leaves_a_node() -> None:
    one = ClusterCollective(
        kind="all_gather", num_bytes=2**36, num_ranks=16, num_nodes=2, ports_per_node=1
    )
    every = one.over(ports_per_node=8)
    assert seconds(one) == pytest.approx(8 * seconds(every), rel=0.05)


# ---- experts ----------------------------------------------------------------------------------


def exchange(**sizes: Any) -> ExpertExchange:
    return ExpertExchange(**{
        "num_tokens": 4096, "hidden": 7168, "topk": 8, "num_experts": 256, "num_ranks": 8, **sizes
    })  # fmt: skip


def test_few_experts_leave_most_of_a_low_latency_kernel_idle() -> None:
    many = exchange(low_latency=True, topk=2)
    few = many.over(num_experts=8)
    assert seconds(few) > 1.5 * seconds(many)
    assert seconds(few.over(low_latency=False)) < seconds(many.over(low_latency=False))


def test_a_token_reaches_no_more_nodes_than_its_routing_allows() -> None:
    wide = exchange(num_ranks=64, num_nodes=8)
    assert wide.node_copies() == pytest.approx(7 / 8 * 4 * (1 - 0.75**8))
    free = wide.over(max_nodes=8)
    assert free.node_copies() == pytest.approx(7 * (1 - (7 / 8) ** 8))
    assert seconds(wide) < seconds(free)
    assert wide.over(low_latency=True).node_copies() == 8 * 7 / 8


def test_throughput_kernels_copy_the_rows_that_stay_too() -> None:
    op = exchange()
    assert op.copied_bytes() == pytest.approx(op.wire_bytes() * 8 / 7)
    rate = expert_exchange.EXPERTS.nominal()["copy_bytes_per_s"]
    large = op.over(num_tokens=2**20)
    assert seconds(large) == pytest.approx(large.copied_bytes() / rate, rel=0.1)

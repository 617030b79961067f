"""Collectives: protocols by size, links, ranks, sockets, switches, networks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, INT8
from hwmodels.errors import InputError, UnknownNameError, UnsupportedError
from simulator.kernel_time import collective
from simulator.kernel_time.model import USUAL
from simulator.kernel_time.rates import rates_of
from workloads.ops.collective_transfer import (
    KINDS,
    ClusterCollective,
    CollectiveTransfer,
    CustomAllReduce,
)

A100, H100 = catalog.device("a100-sxm4-80gb"), catalog.device("h100-sxm")
SIZES = 2.0 ** np.arange(8, 33)


def seconds(op: Any, device: Any = H100) -> Any:
    model = next(m for m in MODELS if type(op) in m.ops)
    return model.time(op, rates_of(device), model.nominal(), USUAL).seconds


MODELS = (collective.MODEL, collective.CUSTOM, collective.CLUSTER, collective.EXPERTS)


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
    assert per_byte[1] > 1.5 * per_byte[0]  # the second socket


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

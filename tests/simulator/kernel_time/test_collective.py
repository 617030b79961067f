"""Collectives: protocols by size, links, ranks, networks."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.errors import InputError, UnknownNameError, UnsupportedError
from simulator.kernel_time.collective import MODEL
from simulator.kernel_time.model import USUAL, Conditions
from simulator.kernel_time.rates import rates_of
from workloads.ops.collective_transfer import KINDS, CollectiveTransfer

H100 = catalog.device("h100-sxm")
SIZES = 2.0 ** np.arange(8, 33)


def seconds(kind: str = "all_reduce", conditions: Conditions = USUAL, **fields: object):  # type: ignore[no-untyped-def]
    op = CollectiveTransfer(kind=kind, **{"num_ranks": 8, "num_bytes": SIZES, **fields})  # type: ignore[arg-type]
    return MODEL.time(op, rates_of(H100), MODEL.nominal(), conditions).seconds


@pytest.mark.parametrize("kind", KINDS)
def test_times_rise_with_bytes_and_ranks(kind: str) -> None:
    assert (np.diff(seconds(kind)) > 0).all()
    by_ranks = [seconds(kind, num_ranks=n, num_bytes=2.0**28) for n in (2, 4, 8, 16)]
    if kind in ("all_reduce",):
        assert by_ranks == sorted(by_ranks)


def test_large_messages_run_at_the_links_rate_and_small_ones_at_the_steps() -> None:
    values = MODEL.nominal()
    large = seconds(num_bytes=2.0**33)
    wire = 2 * 7 / 8 * 2**33 * (1 + values["pairs"] / 7)
    assert large == pytest.approx(wire / (values["simple_frac"] * 450e9), rel=0.02)
    small = seconds(num_bytes=512.0)
    assert small == pytest.approx(values["launch_s"] + 14 * values["ll_step_s"], rel=0.02)


def test_custom_kernels_beat_the_ring_on_small_messages_only() -> None:
    custom = seconds(conditions=Conditions(kernel="custom-vllm"))
    ring = seconds()
    assert custom[0] < ring[0] and custom[-1] == ring[-1]
    assert (custom <= ring * (1 + 1e-12)).all()


def test_nodes_add_their_network() -> None:
    one, two = (seconds(num_nodes=n, num_ranks=16, num_bytes=2.0**30) for n in (1, 2))
    values = MODEL.nominal()
    wire = 2 * 15 / 16 * 2**30
    assert two - one == pytest.approx(
        2 * values["net_step_s"] + wire / values["net_bytes_per_s"], rel=1e-6
    )


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="all_reduce"):
        CollectiveTransfer(kind="all_reduc", num_bytes=1, num_ranks=2)
    with pytest.raises(InputError, match="num_nodes"):
        CollectiveTransfer(kind="all_reduce", num_bytes=1, num_ranks=2, num_nodes=4)
    import dataclasses

    lonely = dataclasses.replace(H100, links=())
    op = CollectiveTransfer(kind="all_reduce", num_bytes=1, num_ranks=2)
    with pytest.raises(UnsupportedError, match="link"):
        MODEL.time(op, rates_of(lonely), MODEL.nominal(), USUAL)

"""Time of the fused selective scan: what it grows with, by hand where it is simple."""

from __future__ import annotations

import pytest

from hwmodels import catalog
from hwmodels.device import Device
from simulator.kernel_time.predict import predict
from simulator.kernel_time.selective_scan import padded_steps
from workloads.ops.selective_scan import SelectiveScan

A100 = catalog.device("a100-sxm4-80gb")


def seconds(on: Device = A100, **change: object) -> float:
    shape: dict[str, object] = {"batch": 4, "len_seq": 8192, "channels": 2048}
    return float(predict(SelectiveScan(**(shape | change)), on=on).seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "padded"),
    [(1, (128, 1)), (129, (256, 1)), (512, (512, 1)), (513, (1024, 2)), (1025, (2048, 4)),
     (2049, (4096, 4))],
)  # fmt: skip
def test_short_sequences_have_small_blocks(length: int, padded: tuple[int, int]) -> None:
    assert padded_steps(length) == padded


def test_long_scans_are_linear_in_everything() -> None:
    for field, value in (("len_seq", 16384), ("batch", 8), ("channels", 4096)):
        assert seconds(**{field: value}) == pytest.approx(2 * seconds(), rel=0.03)
    assert 1.7 < seconds(state_dim=32) / seconds(state_dim=16) < 2


def test_a_state_and_step_by_hand() -> None:
    """12 instructions on 64 lanes an SM at 90 %, an exponential in 16, 4 bytes of 40 a clock."""
    narrow, wide = seconds(state_dim=16), seconds(state_dim=32)
    clocks = 12 / 64 / 0.9 + 1 / 16 + 4 / 40
    steps = 4 * 8192 * 2048 * 16
    rounds = 4 * 2048 / (3 * 108)
    ragged = 0.5 + 0.5 * 26 / rounds
    by_hand = ragged * steps * clocks / (108 * 1.41e9)
    assert wide - narrow == pytest.approx(by_hand, rel=0.02)


def test_a_device_with_more_lanes_is_faster() -> None:
    assert seconds(catalog.device("h100-sxm")) < 0.7 * seconds()

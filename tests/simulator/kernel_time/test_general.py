"""The general path: every op on every device with rates, never below the bound, monotone."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP16
from hwmodels.errors import UnsupportedError
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.general import MODEL
from simulator.kernel_time.model import REPLAYED, USUAL, Conditions
from simulator.kernel_time.rates import rates_of
from tests.simulator.kernel_time.test_every_model import RATES, grown, sizes
from tests.simulator.test_estimate import small
from workloads import registry
from workloads.op import Op
from workloads.ops.counted import CountedOp

H100 = catalog.device("h100-sxm")
LINKED = {
    "collective", "cluster_collective", "staged_collective", "custom_all_reduce", "expert_exchange",
}  # fmt: skip
NAMES = [name for name in registry.names() if name not in LINKED]
BEST = {c.name: c.high if c.name.endswith(("_frac", "_clk")) else c.low for c in MODEL.constants}
"""Constants at the end of their bounds that makes every kernel fastest."""


def seconds(op: Op, device: object = H100, conditions: Conditions = USUAL, **moved: float) -> float:
    rates = rates_of(device)  # type: ignore[arg-type]
    changed = {name: getattr(rates, name) * factor for name, factor in moved.items()}
    rates = dataclasses.replace(rates, **changed)
    return float(MODEL.time(op, rates, MODEL.nominal(), conditions).seconds)


@pytest.mark.parametrize("device", [d for d in catalog.device_ids() if "tpu" not in d])
def test_every_op_on_every_device_stays_above_its_bound(device: str) -> None:
    on = catalog.device(device)
    constants = {**MODEL.nominal(), **BEST}
    timed = 0
    for name in NAMES:
        for scale in (1, 64):
            op = grown(small(name, FP16), scale)
            try:
                time = MODEL.time(op, rates_of(on), constants, USUAL).seconds
            except UnsupportedError:
                continue  # a format the device has no rate for
            assert time >= estimate(op, on=on, rung=BOUND).lower_s * (1 - 1e-9), (name, scale)
            timed += 1
    assert timed > 10


@pytest.mark.parametrize("name", NAMES)
def test_no_rate_makes_a_kernel_slower(name: str) -> None:
    for scale in (1, 64):
        op = grown(small(name, BF16), scale)
        for conditions in (USUAL, Conditions(l2=REPLAYED)):
            before = seconds(op, conditions=conditions)
            for rate in RATES:
                after = seconds(op, conditions=conditions, **{rate: 1.3})
                assert after <= before * (1 + 1e-9), (rate, op)


@pytest.mark.parametrize("name", NAMES)
def test_no_size_makes_a_kernel_faster(name: str) -> None:
    op = small(name, BF16)
    for field, value in sizes(op):
        times = []
        for factor in (1, 2, 4, 8):
            try:
                times.append(seconds(op.over(**{field: value * factor})))
            except Exception as error:
                assert type(error).__name__ == "InputError"  # a size of a fixed kind
                break
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(times)), field


def test_latencies_are_switched_on_by_counts() -> None:
    values = MODEL.nominal()
    plain = CountedOp(moved_bytes=2**20)
    floor = seconds(plain)
    product = seconds(dataclasses.replace(plain, tensor_flops=10**8))
    assert product - floor == pytest.approx(values["product_s"], rel=0.05)


def test_few_blocks_leave_the_device_idle() -> None:
    op = CountedOp(moved_bytes=2**20, tensor_flops=10**12, num_blocks=1)
    few, many = seconds(op), seconds(op.over(num_blocks=132))
    assert few / many == pytest.approx(132, rel=0.05)


def test_the_derivative_is_that_of_a_difference() -> None:
    op, rates = small("attention", BF16), rates_of(H100)
    values, step = MODEL.nominal(), 1e-20
    for name in ("hbm_bytes_per_s", "clock_hz", "matmul_scale", "special_ops_per_clk"):
        value = getattr(rates, name)
        moved = dataclasses.replace(rates, **{name: np.array([value * (1 + 1j * step)])})
        time = MODEL.time(op, moved, values, USUAL).seconds
        slope = float(np.asarray(time).imag[0]) / step
        sides = [
            MODEL.time(op, dataclasses.replace(rates, **{name: value * f}), values, USUAL).seconds
            for f in (1 - 1e-5, 1 + 1e-5)
        ]
        assert slope == pytest.approx((sides[1] - sides[0]) / 2e-5, rel=1e-3, abs=1e-13), name


@pytest.mark.parametrize("name", sorted(LINKED))
def test_traffic_over_links_is_none_of_its_business(name: str) -> None:
    with pytest.raises(UnsupportedError, match="links"):
        seconds(small(name, BF16))


def test_devices_of_another_make_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="TensorCore"):
        seconds(small("softmax", BF16), catalog.device("tpu-v4"))

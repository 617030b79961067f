"""Short convolutions and scans: order, bounds, switches, derivatives, and constants recovered."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.model import COLD, REPLAYED, Conditions
from simulator.kernel_time.rates import rates_of
from simulator.kernel_time.registry import model_of
from simulator.kernel_time.scan import SHORT_CONV
from validate.batches import Batch
from validate.fitting import Problem, fit
from workloads.op import Op
from workloads.ops.chunk_scan import MambaChunkScan
from workloads.ops.delta_rule import GatedDeltaRule, GatedDeltaStep
from workloads.ops.short_conv import ShortConv

DEVICES = ("a100-sxm4-80gb", "h100-sxm", "b200-sxm", "rtx-pro-6000-blackwell-server", "l4")
LENGTHS = np.unique(np.round(np.geomspace(1, 65536, 300)))
KERNELS = ("", "triton-conv1d", "causal-conv1d", "causal-conv1d-sglang-unaligned")
OPS: tuple[tuple[Op, str], ...] = (
    *((ShortConv(batch=2, len_seq=777, channels=4096), kernel) for kernel in KERNELS),
    (ShortConv(batch=33, channels=4096, update=True), "conv1d-update"),
    (GatedDeltaRule(batch=2, len_seq=777, num_heads=16, num_key_heads=4), "fla"),
    (GatedDeltaRule(batch=2, len_seq=777, num_heads=16, num_key_heads=4), "flashinfer"),
    (GatedDeltaStep(batch=33, num_heads=16, num_key_heads=4), "recurrent-packed"),
    (MambaChunkScan(batch=2, len_seq=777, num_heads=64, num_groups=8), "ssd"),
)
IDS = [f"{op.name}-{kernel}" for op, kernel in OPS]


def seconds(op: Op, kernel: str, device: str = "h100-sxm", l2: str = REPLAYED, **rates: Any) -> Any:
    whole, model = rates_of(catalog.device(device)), model_of(type(op))
    moved = {name: getattr(whole, name) * factor for name, factor in rates.items()}
    given = dataclasses.replace(whole, **moved)
    return model.time(op, given, model.nominal(), Conditions(kernel=kernel, l2=l2)).seconds


@pytest.mark.parametrize(("op", "kernel"), OPS, ids=IDS)
@pytest.mark.parametrize("l2", [COLD, REPLAYED])
def test_no_size_makes_it_faster(op: Op, kernel: str, l2: str) -> None:
    moved = 0
    for field in ("batch", "len_seq", "channels", "num_heads", "width", "state_dim", "value_dim"):
        if not hasattr(op, field) or (field == "len_seq" and getattr(op, "update", False)):
            continue
        times = seconds(op.over(**{field: LENGTHS}), kernel, l2=l2)
        assert np.all(np.diff(times) >= -1e-15), field
        moved += 1
    assert moved >= 2


@pytest.mark.parametrize(("op", "kernel"), OPS, ids=IDS)
@pytest.mark.parametrize("device", DEVICES)
def test_no_rate_makes_it_slower(op: Op, kernel: str, device: str) -> None:
    before = seconds(op, kernel, device)
    names = ("num_sms", "clock_hz", "hbm_bytes_per_s", "l2_bytes", "special_ops_per_clk",
             "matmul_scale", "vector_scale")  # fmt: skip
    for name in names:
        assert seconds(op, kernel, device, **{name: 1.7}) <= before * (1 + 1e-12), name


@pytest.mark.parametrize(("op", "kernel"), OPS, ids=IDS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_cold_kernel_is_not_faster_than_its_bound(op: Op, kernel: str, device: str) -> None:
    on, model = catalog.device(device), model_of(type(op))
    fastest = {
        c.name: c.high if c.name.endswith(("_frac", "_per_clk")) else c.low
        for c in model.all_constants()
    }
    for factor in (1, 16, 1024):
        large = op.over(batch=op.batch * factor)  # type: ignore[attr-defined]
        time = model.time(large, rates_of(on), fastest, Conditions(kernel=kernel))
        assert time.seconds >= estimate(large, on=on, rung=BOUND).lower_s * (1 - 1e-9)


@pytest.mark.parametrize(("op", "kernel"), OPS, ids=IDS)
def test_jumps_stand_at_tile_and_wave_switches_only(op: Op, kernel: str) -> None:
    """Between two batches that need no further wave, time moves by less than 15 %."""
    batches = np.arange(1.0, 2000.0)
    times = seconds(op.over(batch=batches), kernel)
    steps = times[1:] / times[:-1]
    few = steps > 1.15
    assert few.sum() <= 12  # the first waves of a chain of whole blocks


@pytest.mark.parametrize(("op", "kernel"), OPS, ids=IDS)
def test_the_complex_step_is_the_derivative(op: Op, kernel: str) -> None:
    for name in ("hbm_bytes_per_s", "clock_hz", "l2_bytes", "num_sms"):
        slope = np.imag(seconds(op, kernel, **{name: 1 + 1e-30j})) / 1e-30
        up, down = (seconds(op, kernel, **{name: 1 + h}) for h in (1e-6, -1e-6))
        assert slope == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-12), name


def test_a_convolution_walks_its_sequence() -> None:
    """Dao's kernel is flat up to 1024 tokens, and its blocks do not depend on the batch's split."""
    short, full = (ShortConv(batch=64, len_seq=n, channels=2048) for n in (8, 1000))
    assert seconds(full, "causal-conv1d") < 1.3 * seconds(short, "causal-conv1d")
    longer = ShortConv(batch=64, len_seq=8192, channels=2048)
    assert seconds(longer, "causal-conv1d") > 4 * seconds(full, "causal-conv1d")


def test_a_delta_rule_is_a_chain_of_chunks() -> None:
    """One head more costs nothing while SMs are idle; one chunk more always costs."""
    op = GatedDeltaRule(len_seq=32768, num_heads=4, num_key_heads=4)
    assert seconds(op.over(num_heads=16), "flashinfer") < 1.02 * seconds(op, "flashinfer")
    twice = seconds(op.over(len_seq=65536), "flashinfer")
    assert twice == pytest.approx(2 * seconds(op, "flashinfer"), rel=0.1)


def test_generated_rows_give_the_constants_back() -> None:
    rng = np.random.default_rng(3)
    size = 400
    op = ShortConv(
        batch=2.0 ** rng.integers(0, 7, size),
        len_seq=np.round(np.exp(rng.uniform(0, 9, size))),
        channels=256.0 * rng.integers(2, 48, size),
    )
    on, model = catalog.device("h100-sxm"), SHORT_CONV
    truth = model.nominal() | {
        "launch_s": 3e-6, "hbm_frac": 0.8, "step_s": 4e-7, "sm_bytes_per_clk": 13.0
    }  # fmt: skip
    conditions = Conditions(kernel="triton-conv1d", l2=REPLAYED)
    exact = model.time(op, rates_of(on), truth, conditions).seconds
    measured = exact * np.exp(rng.normal(0, 0.02, size))
    batch = Batch("h100-sxm", op, conditions, np.arange(size, dtype=np.intp))
    found = fit(Problem(on, (batch,), (model,), measured)).constants(model)
    for name, tolerance in (("launch_s", 0.1), ("sm_bytes_per_clk", 0.1), ("step_s", 0.3)):
        assert found[name].value == pytest.approx(truth[name], rel=tolerance), name
        assert found[name].status == "fitted"

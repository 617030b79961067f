"""Streaming kernels: order, bounds, continuity, hosts, derivatives, and constants recovered."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, FP16, FP32
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.model import COLD, REPLAYED, Conditions
from simulator.kernel_time.rates import rates_of
from simulator.kernel_time.streaming import FLAT, MODEL, SHAPES, shape_of
from validate.batches import Batch
from validate.fitting import Problem, fit
from workloads.op import Op
from workloads.ops.adam import AdamStep
from workloads.ops.elementwise import add, gelu
from workloads.ops.embedding import Embedding
from workloads.ops.norm import LayerNorm, RmsNorm
from workloads.ops.rope import Rope
from workloads.ops.row_map import RowMap
from workloads.ops.softmax import Softmax

DEVICES = ("p4", "v100-pcie-32gb", "a100-sxm4-80gb", "h100-sxm", "b200-sxm", "rtx-4090")
OPS: tuple[tuple[Op, str], ...] = (
    (add(10**6, FP32), ""),
    (gelu(10**6), ""),
    (AdamStep(num_parameters=10**6), ""),
    (Softmax(rows=500, cols=3000), ""),
    (Softmax(rows=500, cols=3000), "unaligned"),
    (Softmax(rows=500, cols=3000), "unstaged"),
    (LayerNorm(rows=500, cols=3000, dtype=FP32), ""),
    (RmsNorm(rows=500, cols=3000, dtype=FP16), "vllm"),
    (Rope(num_tokens=500, num_heads=8, head_dim=128), ""),
    (Embedding(num_tokens=500, dim=4096, vocab_size=32000), "vllm-embedding"),
    (RowMap(rows=500, cols=3000, num_inputs=2), "vllm-silu"),
    (RowMap(rows=500, cols=3000, dtype=BF16, out_dtype=FP8), "vllm-quant"),
)
IDS = [f"{op.name}-{kernel}" for op, kernel in OPS]
GROWING = ("num_elements", "rows", "cols", "num_tokens", "num_heads", "dim", "num_parameters")


def seconds(op: Op, kernel: str, device: str = "h100-sxm", l2: str = REPLAYED, **rates: Any) -> Any:
    whole = rates_of(catalog.device(device))
    moved = {name: getattr(whole, name) * factor for name, factor in rates.items()}
    given = dataclasses.replace(whole, **moved)
    return MODEL.time(op, given, MODEL.nominal(), Conditions(kernel=kernel, l2=l2)).seconds


@pytest.mark.parametrize(("op", "kernel"), OPS, ids=IDS)
@pytest.mark.parametrize("l2", [COLD, REPLAYED])
def test_time_rises_smoothly_with_every_size(op: Op, kernel: str, l2: str) -> None:
    sizes = np.unique(np.round(np.geomspace(64, 2**24, 1200)))
    moved = 0
    for field in GROWING:
        if hasattr(op, field):
            times = seconds(op.over(**{field: sizes}), kernel, l2=l2)
            assert np.all(np.diff(times) >= -1e-15), field
            assert np.all(times[1:] < 1.15 * times[:-1]), field
            moved += 1
    assert moved


@pytest.mark.parametrize(("op", "kernel"), OPS, ids=IDS)
@pytest.mark.parametrize("device", DEVICES)
def test_no_rate_makes_it_slower(op: Op, kernel: str, device: str) -> None:
    before = seconds(op, kernel, device)
    names = ("num_sms", "clock_hz", "hbm_bytes_per_s", "l2_bytes", "special_ops_per_clk",
             "vector_scale")  # fmt: skip
    for name in names:
        assert seconds(op, kernel, device, **{name: 1.7}) <= before * (1 + 1e-12), name


@pytest.mark.parametrize(("op", "kernel"), OPS, ids=IDS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_cold_kernel_is_not_faster_than_its_bound(op: Op, kernel: str, device: str) -> None:
    on = catalog.device(device)
    fastest = {
        c.name: c.high if c.name.endswith(("_frac", "_per_clk")) else c.low
        for c in MODEL.all_constants()
    }
    field = next(f for f in GROWING if hasattr(op, f))
    for factor in (1, 32, 4096):
        large = op.over(**{field: getattr(op, field) * factor})
        time = MODEL.time(large, rates_of(on), fastest, Conditions(kernel=kernel)).seconds
        assert time >= estimate(large, on=on, rung=BOUND).lower_s * (1 - 1e-9)


@pytest.mark.parametrize(("op", "kernel"), OPS, ids=IDS)
def test_the_complex_step_is_the_derivative(op: Op, kernel: str) -> None:
    for name in ("hbm_bytes_per_s", "clock_hz", "l2_bytes", "num_sms"):
        slope = np.imag(seconds(op, kernel, **{name: 1 + 1e-30j})) / 1e-30
        up, down = (seconds(op, kernel, **{name: 1 + h}) for h in (1e-6, -1e-6))
        assert slope == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-13), name


def test_the_host_hides_short_kernels_and_adds_to_long_ones() -> None:
    def timed(num_elements: int, host: str) -> float:
        rates, constants = rates_of(catalog.device("a100-sxm4-80gb")), MODEL.nominal()
        conditions = Conditions(host=host, l2=REPLAYED)
        return float(MODEL.time(add(num_elements), rates, constants, conditions).seconds)

    floor = MODEL.nominal()["host_s"] + MODEL.nominal()["hidden_s"]
    assert timed(1, "eager") == pytest.approx(floor, rel=1e-3)
    assert timed(10**6, "eager") == pytest.approx(floor, rel=0.01)
    long = timed(10**9, "")
    assert timed(10**9, "eager") == pytest.approx(long + MODEL.nominal()["host_s"], rel=1e-6)


def test_few_long_rows_wait_for_their_rounds() -> None:
    """The same elements in few rows leave most SMs idle, where rows have blocks of their own."""
    wide, tall = (RowMap(rows=r, cols=2**22 // r, num_inputs=2) for r in (8, 4096))
    assert seconds(wide, "vllm-silu") > 4 * seconds(tall, "vllm-silu")
    assert seconds(wide, "") == pytest.approx(seconds(tall, ""), rel=1e-12)


def test_kernels_fall_back_on_the_usual_shape() -> None:
    norm = RmsNorm(rows=8, cols=64)
    assert shape_of(norm, "vllm") is SHAPES["vllm", RmsNorm]
    assert shape_of(norm, "unheard-of") is shape_of(norm, "")
    assert shape_of(add(10), "unheard-of") is FLAT
    assert shape_of(gelu(10), "").accesses > FLAT.accesses


def test_generated_rows_give_the_constants_back() -> None:
    rng = np.random.default_rng(5)
    size = 300
    op = add(np.round(np.exp(rng.uniform(5, 19, size))), FP32)
    on = catalog.device("v100-pcie-32gb")
    conditions = Conditions(host="harness", l2=REPLAYED)
    truth = MODEL.nominal() | {"hbm_frac": 0.8, "host_s": 3e-5, "hidden_s": 2.5e-5}
    exact = MODEL.time(op, rates_of(on), truth, conditions).seconds
    measured = exact * np.exp(rng.normal(0, 0.01, size))
    batch = Batch(on.id, op, conditions, np.arange(size, dtype=np.intp))
    found = fit(Problem(on, (batch,), (MODEL,), measured)).constants(MODEL)
    for name, tolerance in (("hbm_frac", 0.02), ("host_s", 0.1), ("hidden_s", 0.1)):
        assert found[name].value == pytest.approx(truth[name], rel=tolerance), name

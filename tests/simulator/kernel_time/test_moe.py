"""The routed experts' model: order, bounds, switches, derivatives, and constants recovered."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, INT4, MXFP4, MXFP8, NVFP4
from hwmodels.errors import UnsupportedError
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.model import COLD, REPLAYED, Conditions
from simulator.kernel_time.moe import MODEL, TILES, moe_labels, moe_seconds, row_tiles
from simulator.kernel_time.rates import PATHS, rates_of
from validate.batches import Batch
from validate.fitting import Problem, fit
from workloads.ops.moe_ffn import COMPUTED, PASSED, MoeFfn

DEVICES = ("a100-sxm4-80gb", "h100-sxm", "b200-sxm", "rtx-pro-6000-blackwell-server", "l4")
TOKENS = np.unique(np.round(np.geomspace(1, 65536, 400)))
ROUTINGS = ("balanced", "power_law_1.01", "power_law_1.2", "balanced_grouped")


def moe(**changes: object) -> MoeFfn:
    values: dict[str, Any] = {
        "num_tokens": 256, "hidden": 4096, "inter": 1536, "topk": 8, "num_experts": 128,
    }  # fmt: skip
    return MoeFfn(**(values | changes))


def seconds(op: MoeFfn, device: str = "h100-sxm", l2: str = REPLAYED, **rates: float) -> Any:
    whole = rates_of(catalog.device(device))
    moved = {name: getattr(whole, name) * factor for name, factor in rates.items()}
    given = dataclasses.replace(whole, **moved)
    return moe_seconds(op, given, MODEL.nominal(), Conditions(l2=l2)).seconds


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("l2", [COLD, REPLAYED])
def test_more_tokens_are_never_faster(device: str, routing: str, l2: str) -> None:
    for ep, remote in ((1, "skipped"), (8, PASSED), (8, COMPUTED), (128, COMPUTED)):
        op = moe(num_tokens=TOKENS, ep=ep, routing=routing, remote=remote)
        assert np.all(np.diff(seconds(op, device, l2)) >= -1e-15)


@pytest.mark.parametrize("field", ["hidden", "inter", "topk"])
@pytest.mark.parametrize("tokens", [1, 48, 8192])
def test_no_size_makes_it_faster(field: str, tokens: int) -> None:
    sizes = np.arange(1.0, 65.0) if field == "topk" else np.arange(64.0, 8192.0, 37.0)
    for routing in ROUTINGS:
        op = moe(num_tokens=tokens, ep=4, routing=routing).over(**{field: sizes})
        assert np.all(np.diff(seconds(op)) >= -1e-15)


@pytest.mark.parametrize("tokens", [1, 48, 8192])
def test_more_ranks_are_never_slower(tokens: int) -> None:
    for field in ("tp", "ep"):
        op = moe(num_tokens=tokens).over(**{field: 2.0 ** np.arange(6)})
        assert np.all(np.diff(seconds(op)) <= 1e-15)


@pytest.mark.parametrize("device", ["a100-sxm4-80gb", "rtx-pro-6000-blackwell-server"])
@pytest.mark.parametrize("rate", [name for name in PATHS if name != "num_sms"])
def test_no_rate_makes_it_slower(device: str, rate: str) -> None:
    for tokens in (1, 64, 8192):
        for l2 in (COLD, REPLAYED):
            op = moe(num_tokens=tokens, ep=4)
            assert seconds(op, device, l2, **{rate: 1.3}) <= seconds(op, device, l2) * (1 + 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", [False, True])
def test_a_cold_run_is_never_faster_than_its_bound(device: str, low: bool) -> None:
    on = catalog.device(device)
    # The fastest constants a fit may give: every time at its least, every rate at its most.
    rates = ("feed_bytes_per_clk", "pass_bytes_per_clk")
    fastest = {c.name: c.high if c.name in rates else c.low for c in MODEL.constants}
    constants = fastest if low else MODEL.nominal()
    for dtype in (BF16, FP8, NVFP4):
        for tokens in (1, 37, 512, 16384):
            for ep in (1, 16):
                op = moe(num_tokens=tokens, ep=ep, dtype=dtype)
                try:
                    bound = estimate(op, on=on, rung=BOUND).lower_s
                    found = moe_seconds(op, rates_of(on), constants, Conditions(l2=COLD)).seconds
                except UnsupportedError:
                    continue
                assert found >= bound * (1 - 1e-9), op


def test_a_format_without_a_rate_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="nvfp4"):
        seconds(moe(dtype=NVFP4), "a100-sxm4-80gb")


def test_neighbours_are_near_but_at_a_tiles_edge() -> None:
    tokens = np.arange(1.0, 4096.0)
    op = moe(num_tokens=tokens)
    times = seconds(op)
    tiles = row_tiles(op.loads())
    switch = np.any(np.diff(tiles, axis=0) != 0, axis=1) | (np.diff(op.experts_hit()) != 0)
    jump = times[1:] / times[:-1] - 1
    assert switch.sum() < 600
    assert np.all(jump[~switch] < 0.02)
    assert np.all(jump < 1)  # a row more opens at most one more tile or expert for each open one


def test_row_tiles_by_hand() -> None:
    tiles = row_tiles(moe(num_tokens=400, topk=8, num_experts=128).loads())  # 25 rows an expert
    expected = [128 * np.ceil(25 / tile_m) for tile_m, _ in TILES]
    assert tiles.tolist() == expected
    few = row_tiles(moe(num_tokens=2).loads())  # 16 experts hit, a tile each
    assert few.tolist() == [16.0] * len(TILES)


def test_derivatives_by_the_complex_step_equal_finite_differences() -> None:
    whole = rates_of(catalog.device("h100-sxm"))
    for tokens in (3, 200, 6000):
        op = moe(num_tokens=tokens, ep=8)
        for name in PATHS:
            value = getattr(whole, name)
            if not value:
                continue

            def at(x: Any, name: str = name, op: MoeFfn = op) -> Any:
                rates = dataclasses.replace(whole, **{name: x})
                return moe_seconds(op, rates, MODEL.nominal(), Conditions(l2=REPLAYED)).seconds

            exact = np.imag(at(value * (1 + 1e-20j))) / 1e-20
            near = (at(value * (1 + 1e-6)) - at(value * (1 - 1e-6))) / 2e-6
            assert exact == pytest.approx(near, rel=2e-4, abs=1e-12), (tokens, name)


def test_a_call_for_several_figures_at_once_agrees_with_calls_one_by_one() -> None:
    whole = rates_of(catalog.device("h100-sxm"))
    factors = np.array([1.0, 1.5, 2.0])
    rates = dataclasses.replace(whole, hbm_bytes_per_s=whole.hbm_bytes_per_s * factors)
    op = moe(num_tokens=32)
    several = moe_seconds(op, rates, MODEL.nominal(), Conditions()).seconds
    alone = [seconds(op, l2=COLD, hbm_bytes_per_s=f) for f in factors]
    assert np.allclose(several, alone, rtol=1e-12)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (moe(), "bf16"),
        (moe(dtype=FP8), "fp8"),
        (moe(dtype=FP8, scaling="block"), "fp8_block"),
        (moe(dtype=NVFP4, scaling="block"), "nvfp4"),
        (moe(weight_dtype=INT4, scaling="block"), "bf16*int4"),
        (moe(dtype=MXFP8, weight_dtype=MXFP4, scaling="block"), "mxfp8*mxfp4"),
    ],
)
def test_labels_name_both_formats(op: MoeFfn, name: str) -> None:
    assert moe_labels(op, Conditions(kernel="triton"))["dtype"] == name


def test_calibrating_on_generated_times_recovers_the_constants() -> None:
    rng = np.random.default_rng(7)
    size = 240
    op = moe(
        num_tokens=np.round(np.exp(rng.uniform(0, np.log(16384), size))),
        hidden=rng.choice([2048.0, 4096.0, 7168.0], size),
        inter=rng.choice([768.0, 2048.0, 8192.0], size),
        tp=2.0 ** rng.integers(0, 4, size),
        ep=2.0 ** rng.integers(0, 6, size),
        remote=PASSED,
    )
    device = catalog.device("h100-sxm")
    conditions = Conditions(kernel="triton", l2=REPLAYED)
    truth = MODEL.nominal() | {
        "launch_s": 4e-5, "mma_loss": 1.2, "hbm_loss": 0.5, "pass_bytes_per_clk": 9.0,
    }  # fmt: skip
    made = moe_seconds(op, rates_of(device), truth, conditions).seconds
    measured = made * np.exp(rng.normal(0, 0.02, size))
    batch = Batch(device.id, op, conditions, np.arange(size))
    problem = Problem(device, (batch,), (MODEL,), measured)
    found = fit(problem)
    values = problem.values(0, found.theta)
    for name in ("launch_s", "mma_loss", "hbm_loss", "pass_bytes_per_clk"):
        assert values[name] == pytest.approx(truth[name], rel=0.25), name
    assert np.mean(np.abs(problem.predicted(found.theta) / made - 1)) < 0.01

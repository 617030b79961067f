"""Matrix products: tiles, splits, formats, chunks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, FP16, FP32, INT4, INT8, NVFP4
from simulator.estimate import BOUND, estimate
from simulator.kernel_time import gemm
from simulator.kernel_time.model import REPLAYED, ROTATED, USUAL, Conditions
from simulator.kernel_time.predict import predict
from simulator.kernel_time.rates import rates_of
from simulator.kernel_time.terms import waves
from workloads.numeric import Array
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.quantised_matmul import QuantisedMatmul

H100 = catalog.device("h100-sxm")
SIZES = st.integers(1, 20_000)
DEVICES = ("h100-sxm", "a100-sxm4-80gb", "b200-sxm", "l40s", "t4")


def seconds(m: float, n: float, k: float, device: str = "h100-sxm", l2: str = "cold") -> float:
    op = Matmul(m=m, n=n, k=k, dtype=FP16)
    return float(predict(op, on=catalog.device(device), conditions=Conditions(l2=l2)).seconds)


@given(SIZES, SIZES, SIZES, st.sampled_from(DEVICES), st.sampled_from(["cold", REPLAYED, ROTATED]))
def test_no_size_makes_a_product_faster(m: int, n: int, k: int, device: str, l2: str) -> None:
    before = seconds(m, n, k, device, l2)
    for larger in ((m + 1, n, k), (m, n + 1, k), (m, n, k + 1), (2 * m, n, k)):
        assert seconds(*larger, device, l2) >= before * (1 - 1e-9)


@given(SIZES, SIZES, SIZES, st.sampled_from(DEVICES))
def test_a_cold_product_is_never_below_its_bound(m: int, n: int, k: int, device: str) -> None:
    op = Matmul(m=m, n=n, k=k, dtype=FP16)
    bound = estimate(op, on=catalog.device(device), rung=BOUND)
    assert seconds(m, n, k, device) >= bound.lower_s


def test_neighbouring_sizes_jump_only_where_a_tile_or_a_wave_begins() -> None:
    for fixed in ({"n": 4096.0, "k": 4096.0}, {"n": 512.0, "k": 8192.0}):
        m = np.arange(1.0, 3000.0)
        times = np.asarray(predict(Matmul(m=m, **fixed), on=H100).seconds)
        jumps = times[1:] / times[:-1] - 1
        begins = np.isin(m[:-1] % 16, [0])  # every tile of the menu is a multiple of 16 rows
        assert jumps[~begins].max() < 5e-3  # a row more is that many bytes more
        large = m[:-1][jumps >= 0.15]  # a skinny tile is full, or a wave is
        assert len(large) <= 6 and (large % 16 == 0).all() and jumps.max() < 0.3


def brute_force(op: Matmul, device: str) -> float:
    """The docstring's formulas for one shape, kernel by kernel, in plain arithmetic."""
    r = rates_of(catalog.device(device))
    c = gemm.MODEL.nominal()
    kernels = gemm.menu(r.device.compute_capability)
    f, num_sms = float(r.clock_hz), float(r.num_sms)
    peak = float(r.matmul_flops_per_s(op.dtype))
    best = np.inf
    for tm, tn in zip(kernels.tile_m[:, 0], kernels.tile_n[:, 0], strict=True):
        if tm <= gemm.SKINNY and op.m > tm:
            continue
        for s in kernels.splits:
            e = op.dtype.bytes_per_element
            steps = -(-op.k // (128 / e * s))
            blocks = -(-op.m // tm) * -(-op.n // tn) * s
            mma = 2 * tm * tn * (128 / e) / (peak / num_sms * c["mma_frac"])
            load = (tm + tn) * 128 / (c["feed_bytes_per_clk"] * f)
            droop = 1 + c["droop"] * np.log1p(2 * op.m * op.n * op.k / peak / 30e-6)
            loop = steps * ((mma**4 + load**4) ** 0.25 + c["step_s"]) * droop
            written = 4 if s > 1 else e
            tail = c["tile_s"] + tm * tn * written / (c["store_bytes_per_clk"] * f)
            compute = waves(blocks, num_sms, c["ragged_frac"]) * (loop + tail)
            moved = e * (op.m * op.k + op.k * op.n + op.m * op.n)
            memory = moved / (float(r.hbm_bytes_per_s) * c["hbm_frac"])
            memory += c["ramp_s"] * min(moved / 2**20, 1)
            extra = c["spread_s"] * min(blocks / num_sms, 1)
            if s > 1:
                sums = 8 * s * op.m * op.n / (c["sum_bytes_per_clk"] * num_sms * f)
                extra += c["split_s"] + sums
            best = min(best, (compute**4 + memory**4) ** 0.25 + extra)
    return float(c["launch_s"] + best)


@given(SIZES, SIZES, SIZES)
def test_the_arrays_compute_the_stated_formulas(m: int, n: int, k: int) -> None:
    op = Matmul(m=m, n=n, k=k)
    found = gemm.MODEL.time(op, rates_of(H100), gemm.MODEL.nominal(), USUAL).seconds
    assert found == pytest.approx(brute_force(op, "h100-sxm"), rel=1e-9)


def test_chunks_change_nothing() -> None:
    rng = np.random.default_rng(5)
    m, n, k = np.round(2 ** rng.uniform(0, 14, (3, 2 * gemm.CHUNK + 77)))
    whole = predict(Matmul(m=m, n=n, k=k), on=H100)
    for i in (0, gemm.CHUNK - 1, gemm.CHUNK, 2 * gemm.CHUNK + 76):
        alone = predict(Matmul(m=m[i], n=n[i], k=k[i]), on=H100)
        assert np.asarray(whole.seconds)[i] == pytest.approx(alone.seconds, rel=1e-12)
    plane = Matmul(m=m[:1200].reshape(30, 40), n=4096, k=k[:1200].reshape(30, 40))
    assert np.shape(predict(plane, on=H100).seconds) == (30, 40)


def time_of(op: object, **changes: float) -> float:
    model = gemm.MODEL
    values = model.nominal() | changes
    return float(model.time(op, rates_of(H100), values, USUAL).seconds)  # type: ignore[arg-type]


def test_splitting_pays_for_deep_narrow_products_only() -> None:
    deep, square = Matmul(m=64, n=64, k=65536), Matmul(m=8192, n=8192, k=8192)
    assert time_of(deep, split_s=1e-5) > 1.05 * time_of(deep)
    assert time_of(square, split_s=1e-5) == time_of(square)


def test_weights_that_fit_the_l2_are_not_read_again() -> None:
    assert seconds(16, 2048, 2048, l2=REPLAYED) < 0.85 * seconds(16, 2048, 2048)
    assert seconds(16, 32768, 8192, l2=REPLAYED) == pytest.approx(
        seconds(16, 32768, 8192), rel=0.01
    )
    assert seconds(16, 4096, 2048, l2=REPLAYED) <= seconds(16, 4096, 2048, l2=ROTATED)


def test_a_board_that_cannot_feed_its_lanes_is_slower_than_its_peak_says() -> None:
    op = Matmul(m=8192, n=8192, k=8192, dtype=FP32)
    t4 = catalog.device("t4")
    unlimited = dataclasses.replace(t4, tdp_w=None)
    values = gemm.MODEL.nominal()
    capped, free = (
        gemm.MODEL.time(op, rates_of(d), values, USUAL).seconds for d in (t4, unlimited)
    )
    # 8.1 TFLOP/s at 12 pJ want 98 W of 70: (1 + 1.39^4)^(1/4) = 1.48 times as long
    assert capped / free == pytest.approx(1.48, rel=0.03)


def test_arithmetic_may_be_wider_than_storage() -> None:
    p100 = catalog.device("p100-pcie-16gb")
    sizes = {"m": 4096, "n": 4096, "k": 4096}
    half = predict(Matmul(**sizes, dtype=FP16, math_dtype=FP32), on=p100).seconds
    full = predict(Matmul(**sizes, dtype=FP32), on=p100).seconds
    assert 0.9 < half / full <= 1.0


@pytest.mark.parametrize(
    ("dtype", "weight", "device"),
    [(FP8, FP8, "h100-sxm"), (NVFP4, NVFP4, "b200-sxm"), (INT8, INT8, "a100-sxm4-80gb"),
     (BF16, INT4, "a100-sxm4-80gb"), (FP8, FP8, "rtx-pro-6000-blackwell-server")],
)  # fmt: skip
def test_quantised_products_cost_what_they_move(dtype, weight, device: str) -> None:  # type: ignore[no-untyped-def]
    on = catalog.device(device)
    op = QuantisedMatmul(m=16, n=8192, k=8192, dtype=dtype, weight_dtype=weight)
    wide = predict(Matmul(m=16, n=8192, k=8192), on=on).seconds
    found = predict(op, on=on)
    assert estimate(op, on=on, rung=BOUND).lower_s < found.seconds < 1.3 * wide
    assert ("quantise" in found.terms) == op.quantises
    m = np.array([16.0, 64.0, 1024.0, 8192.0])
    times = np.asarray(predict(op.over(m=m), on=on).seconds)
    assert (np.diff(times) > 0).all()


def test_a_batch_is_its_products_side_by_side() -> None:
    one = predict(BatchedMatmul(batch=1, m=128, n=128, k=512), on=H100).seconds
    many = predict(BatchedMatmul(batch=64, m=128, n=128, k=512), on=H100).seconds
    assert one < many < 8 * one


def test_menus_are_those_of_the_architecture() -> None:
    def tiles(cc: str | None) -> set[tuple[float, float]]:
        m: Array = gemm.menu(cc).tile_m[:, 0]
        return set(zip(m.tolist(), gemm.menu(cc).tile_n[:, 0].tolist(), strict=True))

    assert tiles("10.0") != tiles("9.0") != tiles("8.0") == tiles("12.0") == tiles(None)
    assert (256.0, 256.0) in tiles("10.3")

"""Long convolutions: passes, the authors' splits, the best order, limits of the time."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels import catalog
from simulator.kernel_time.long_conv import MODEL, passes, split
from simulator.kernel_time.model import USUAL
from simulator.kernel_time.predict import predict
from simulator.kernel_time.rates import rates_of
from workloads.ops.fft_convolution import FFTConvolution, LongConvolution
from workloads.ops.flash_fft_conv import FlashFFTConv

H100 = catalog.device("h100-sxm")
RATES = rates_of(H100)


def fused(log2: int, **change: object) -> FlashFFTConv:
    op = FlashFFTConv(batch=64, channels=768, len_seq=2**log2, circular=True, gated=True)
    return op.over(**change)


def seconds(op: LongConvolution) -> float:
    return float(predict(op, on=H100).seconds)


def test_a_transform_that_shared_memory_holds_is_one_pass() -> None:
    """228 KiB an SM: 16K points of 8 bytes, not 32K."""
    found = [passes(2**q, RATES) for q in (0, 8, 14, 15, 22, 28, 29)]
    assert found == [1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("log2", "outer", "factor_sum"),
    [(8, 1, 32), (10, 1, 64), (12, 1, 48), (13, 1, 64), (14, 1, 80), (15, 1, 96),
     (16, 16, 48), (17, 32, 48), (20, 32, 96), (21, 64, 96), (22, 128, 96)],
)  # fmt: skip
def test_the_split_is_the_authors(log2: int, outer: int, factor_sum: int) -> None:
    found = split(fused(log2), RATES)
    assert (found.outer, found.factor_sum) == (outer, factor_sum)


@pytest.mark.parametrize("log2", [8, 10, 12, 13, 14, 15])
def test_the_order_chosen_is_the_fastest(log2: int) -> None:
    best = min((2, 3), key=lambda order: seconds(fused(log2, order=order)))
    assert best == fused(log2).tiling(232448)["order"]
    assert seconds(fused(log2)) == min(seconds(fused(log2, order=p)) for p in (2, 3))


def test_a_library_call_by_hand() -> None:
    """1K, ungated, unpadded: cast 6, transforms 24, fill 8, product 16, scale 16, crop 10."""
    op = FFTConvolution(batch=64, channels=1, len_seq=2**20, circular=True)
    c = MODEL.nominal()
    terms = MODEL.time(op, RATES, c, USUAL).terms
    n, hbm = 2**20, RATES.hbm_bytes_per_s
    streamed = n * (64 * (6 + 40 + 10) + 16)
    moved = n * 2 * (64 * 24 + 8)
    ramp = c["ramp_s"]
    assert terms["streamed"] - ramp == pytest.approx(streamed / (hbm * c["hbm_frac"]))
    assert terms["passes"] - ramp == pytest.approx(moved / (hbm * c["fft_frac"]))
    assert terms["launch"] == 8 * c["launch_s"]


def test_the_fused_kernel_wins_most_where_it_fuses() -> None:
    shapes = [{"batch": 64, "channels": 768, "len_seq": 2**q, "circular": True} for q in (10, 20)]
    short, long = (seconds(FFTConvolution(**s)) / seconds(FlashFFTConv(**s)) for s in shapes)
    assert 1 < long < short


@pytest.mark.parametrize("kind", [FFTConvolution, FlashFFTConv])
@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("device", ["h100-sxm", "a100-sxm4-80gb", "v100-sxm2-16gb"])
def test_longer_is_never_faster(kind: type[LongConvolution], circular: bool, device: str) -> None:
    lengths = 2.0 ** np.arange(1, 24)
    op = kind(batch=4, channels=64, len_seq=lengths, circular=circular, gated=True)
    times = np.asarray(predict(op, on=catalog.device(device)).seconds)
    assert (np.diff(times) >= -1e-9 * times[:-1]).all()

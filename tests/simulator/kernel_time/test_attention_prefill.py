"""The prefill and backward models: order, bounds, switches, derivatives, constants recovered."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, FP16, FP32
from hwmodels.errors import UnsupportedError
from simulator.estimate import BOUND, estimate
from simulator.kernel_time import attention_backward
from simulator.kernel_time.attention_prefill import KERNELS, MODEL, USUAL, padded
from simulator.kernel_time.model import COLD, REPLAYED, Conditions, KernelModel
from simulator.kernel_time.rates import PATHS, rates_of
from simulator.kernel_time.registry import model_of
from validate.batches import Batch
from validate.fitting import Problem, fit
from workloads.op import Op
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.prefill_attention import MlaPrefill, PrefillAttention

DEVICES = ("a100-sxm4-80gb", "h100-sxm", "b200-sxm", "rtx-pro-6000-blackwell-server", "t4", "p4")
LENGTHS = np.unique(np.round(np.geomspace(1, 65536, 500)))
RATES = [field for field in PATHS if field != "num_sms"]
MONOTONE = ("", "vllm+cache:fa2", "sglang+cache:flashinfer", "sglang+cache:triton", "x:fa4-wide")
"""Kernels without a stated switch: FlashAttention-3's rule to split is one."""


def prefill(**changes: object) -> PrefillAttention:
    values: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "len_q": 1000, "head_dim": 128}
    return PrefillAttention(**(values | changes))


def backward(**changes: object) -> FlashAttention2Backward:
    values: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "len_q": 1000, "head_dim": 128}
    return FlashAttention2Backward(**(values | changes))


def seconds(
    op: Op,
    device: str = "h100-sxm",
    kernel: str = "",
    l2: str = REPLAYED,
    **rates: Any,
) -> Any:
    model: KernelModel = MODEL
    if isinstance(op, FlashAttention2Backward):
        model = attention_backward.MODEL
    whole = rates_of(catalog.device(device))
    moved = {name: getattr(whole, name) * factor for name, factor in rates.items()}
    given = dataclasses.replace(whole, **moved)
    return model.time(op, given, model.nominal(), Conditions(kernel=kernel, l2=l2)).seconds


@pytest.mark.parametrize("kernel", MONOTONE)
@pytest.mark.parametrize("l2", [COLD, REPLAYED])
def test_more_positions_are_never_faster(kernel: str, l2: str) -> None:
    for changes in ({}, {"causal": False}, {"window": 300}, {"batch": 64, "num_kv_heads": 32}):
        longer = prefill(**changes, len_q=LENGTHS)
        assert np.all(np.diff(seconds(longer, kernel=kernel, l2=l2)) >= -1e-15), changes
        chunk = prefill(**changes, len_q=np.arange(1.0, 3000.0), len_kv=3000)
        assert np.all(np.diff(seconds(chunk, kernel=kernel, l2=l2)) >= -1e-15), changes
        after = prefill(**changes, len_q=100, len_kv=np.arange(100.0, 3000.0))
        assert np.all(np.diff(seconds(after, kernel=kernel, l2=l2)) >= -1e-15), changes


@pytest.mark.parametrize("kernel", MONOTONE)
def test_no_other_size_makes_it_faster(kernel: str) -> None:
    for length in (1, 100, 3000):
        for changes in (
            {"batch": np.arange(1.0, 300.0)},
            {"num_heads": np.arange(1.0, 64.0) * 8},
            {"num_heads": 64, "num_kv_heads": 2.0 ** np.arange(7)},
            {"head_dim": np.arange(8.0, 520.0, 8)},
            {"value_dim": np.arange(8.0, 520.0, 8)},
            {"window": np.arange(1.0, 3000.0)},
        ):
            op = prefill(**({"len_q": length} | changes))
            assert np.all(np.diff(seconds(op, kernel=kernel)) >= -1e-15), (length, changes)


@pytest.mark.parametrize("causal", [False, True])
def test_no_size_makes_the_backward_pass_faster(causal: bool) -> None:
    for changes in (
        {"len_q": LENGTHS},
        {"len_q": np.arange(1.0, 3000.0), "len_kv": 3000},
        {"len_q": 100, "len_kv": np.arange(100.0, 3000.0)},
        {"batch": np.arange(1.0, 300.0)},
        {"num_heads": np.arange(1.0, 64.0) * 8},
        {"head_dim": np.arange(8.0, 256.0, 8)},
    ):
        assert np.all(np.diff(seconds(backward(causal=causal, **changes))) >= -1e-15), changes


@pytest.mark.parametrize("device", DEVICES[:4])
@pytest.mark.parametrize("kernel", ["", "vllm+cache:fa3", "sglang+cache:flashinfer"])
def test_no_rate_makes_it_slower(device: str, kernel: str) -> None:
    for op in (prefill(len_q=64), prefill(batch=8, dtype=FP16), backward(causal=True)):
        before = seconds(op, device, kernel)
        for rate in RATES:
            after = seconds(op, device, kernel, **{rate: 1.3})
            assert after <= before * (1 + 1e-12), (rate, op)


@pytest.mark.parametrize("device", DEVICES)
def test_a_cold_kernel_is_never_faster_than_its_bound(device: str) -> None:
    on = catalog.device(device)
    for length in (1, 65, 1000, 8192):
        for changes in ({}, {"causal": False}, {"num_heads": 1, "num_kv_heads": 1, "batch": 7}):
            dtype = FP32 if device == "p4" else FP16
            shape: dict[str, Any] = {"len_q": length, "dtype": dtype} | changes
            flash = FlashAttention2(
                **({"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "causal": True} | shape)
            )
            for op in (prefill(**shape), flash, backward(**shape), prefill(**shape, value_dim=64)):
                lower_s = estimate(op, on=on, rung=BOUND).lower_s
                for kernel in ("", "vllm+cache:fa3", "vllm+cache:fa2"):
                    assert seconds(op, device, kernel, COLD) >= lower_s, (op, kernel)


def test_a_windowed_kernel_is_never_faster_than_its_bound() -> None:
    on = catalog.device("h100-sxm")
    for window in (1, 64, 100, 1000):
        op = prefill(len_q=4096, window=window, batch=16)
        assert seconds(op, l2=COLD) >= estimate(op, on=on, rung=BOUND).lower_s


def test_only_tiles_make_it_jump() -> None:
    """Neighbours within 15 % but where a tile of 64 rows or keys begins."""
    for causal in (True, False):
        lengths = np.arange(1.0, 4000.0)
        times = seconds(prefill(len_q=lengths, causal=causal))
        jump = times[1:] / times[:-1]
        switches = (lengths[:-1] * 4) % 64 == 0  # four heads share a tile
        assert np.all(jump[~switches] < 1.15)
        assert np.all(jump[200:] < 1.15)


def test_windows_save_time_unless_the_kernel_visits_every_key() -> None:
    long, cut = prefill(len_q=16384), prefill(len_q=16384, window=1024)
    assert seconds(cut) < 0.25 * seconds(long)
    kernel = "sglang:triton"
    assert seconds(cut, kernel=kernel) == seconds(long, kernel=kernel)
    assert seconds(prefill(window=5000)) == seconds(prefill())


def test_fa3_splits_the_keys_where_one_sequence_leaves_sms_idle() -> None:
    alone = prefill(num_heads=1, num_kv_heads=1, len_q=4096)
    assert seconds(alone, kernel="x:fa3") < 0.8 * seconds(alone, kernel="x:fa2")
    rates, run = rates_of(catalog.device("h100-sxm")), Conditions(kernel="x:fa3")
    slow_sum = MODEL.nominal() | {"split_s": 1.0}
    assert MODEL.time(alone, rates, slow_sum, run).seconds > 1.0
    # not with four key blocks, nor with query tiles enough for 132 SMs
    for op in (alone.over(len_q=512), prefill(num_heads=128, len_q=4096)):
        assert MODEL.time(op, rates, slow_sum, run).seconds < 1.0


def test_padding_follows_the_widths_a_kernel_is_compiled_for() -> None:
    widths: Any = np.array([40.0, 64, 72, 80, 100, 192, 200, 300])
    fa2: Any = padded(widths, KERNELS["fa2"])
    assert fa2.tolist() == [64, 64, 96, 96, 128, 192, 256, 304]
    few: Any = padded(widths, KERNELS["fa3-256"])
    assert few.tolist() == [64, 64, 128, 128, 128, 256, 256, 304]
    any_width: Any = padded(widths, USUAL)
    assert any_width.tolist() == [48, 64, 80, 80, 112, 192, 208, 304]


def test_work_beside_attention_is_timed_where_the_label_names_it() -> None:
    op = prefill(len_q=4096)
    assert seconds(op, kernel="x+cache:fa2") > seconds(op, kernel="x:fa2") + 4e-6
    assert seconds(op, kernel="x:fa2/eager") >= MODEL.nominal()["pace_s"]
    small = prefill(len_q=16)
    assert seconds(small, kernel="x:fa2/eager") < 1.01 * MODEL.nominal()["pace_s"]


def test_narrow_formats_run_at_a_share_of_their_rate() -> None:
    big = {"len_q": 32768, "batch": 4}
    ratio = seconds(prefill(**big)) / seconds(prefill(**big, dtype=FP8, out_dtype=BF16))
    assert 1.0 < ratio < 2.0


def test_a_device_without_the_format_says_so() -> None:
    with pytest.raises(UnsupportedError):
        seconds(prefill(dtype=FP8), "a100-sxm4-80gb")


@pytest.mark.parametrize("op", [prefill(batch=4), backward(causal=True)], ids=["fwd", "bwd"])
@pytest.mark.parametrize("rate", ["clock_hz", "hbm_bytes_per_s", "special_ops_per_clk"])
def test_the_complex_step_is_the_derivative(op: Op, rate: str) -> None:
    h = 1e-6
    moved = seconds(op, **{rate: complex(1, 1e-30)}).imag / 1e-30
    central = (seconds(op, **{rate: 1 + h}) - seconds(op, **{rate: 1 - h})) / (2 * h)
    assert moved == pytest.approx(central, rel=1e-5)


def test_arrays_of_rates_agree_with_numbers() -> None:
    op = prefill(batch=4)
    several = seconds(op, kernel="x+cache:fa3", clock_hz=np.array([1.0, 1.5]))
    for value, factor in zip(several, (1.0, 1.5), strict=True):
        alone = seconds(op, kernel="x+cache:fa3", clock_hz=factor)
        assert value == pytest.approx(alone, rel=1e-12)


def test_latent_attention_is_timed_by_the_same_model() -> None:
    assert model_of(MlaPrefill) is MODEL and model_of(FlashAttention2) is MODEL
    op = MlaPrefill(num_heads=16, len_q=2048, head_dim=192, value_dim=128, batch=64)
    same = PrefillAttention(num_heads=16, len_q=2048, head_dim=192, value_dim=128, batch=64)
    assert seconds(op) == seconds(same) < seconds(op.over(value_dim=192))
    # FlashAttention-2 computes with values padded to the width of keys.
    rates, run = rates_of(catalog.device("h100-sxm")), Conditions(kernel="x:fa2")
    narrow, wide = (
        MODEL.time(each, rates, MODEL.nominal(), run).terms["compute"]
        for each in (op, op.over(value_dim=192))
    )
    assert narrow == wide


TRUTH = {"mma_frac": 0.62, "cta_s": 1.7e-6, "launch_s": 6e-6, "chain": 1.9, "query_passes": 0.6}


def test_fitting_generated_times_recovers_the_constants() -> None:
    rng = np.random.default_rng(7)
    kv: Any = 2.0 ** rng.integers(0, 4, 400)
    batch_sizes: Any = 2.0 ** rng.integers(0, 8, 400)
    op = PrefillAttention(
        batch=batch_sizes, num_heads=kv * 2.0 ** rng.integers(0, 4, 400),
        num_kv_heads=kv, len_q=np.round(2 ** rng.uniform(0, 14, 400)), head_dim=128,
    )  # fmt: skip
    on, run = catalog.device("h100-sxm"), Conditions(kernel="x+cache:k", l2=REPLAYED)
    truth = MODEL.nominal() | TRUTH
    times = MODEL.time(op, rates_of(on), truth, run).seconds
    noisy = times * np.exp(0.02 * rng.standard_normal(400))
    batch = Batch("h100-sxm", op, run, np.arange(400))
    found = fit(Problem(on, (batch,), (MODEL,), noisy)).constants(MODEL)
    for name in ("mma_frac", "cta_s", "chain"):
        assert found[name].value == pytest.approx(truth[name], rel=0.1), name
        assert found[name].status == "fitted"
    floor = found["launch_s"].value + found["beside_s"].value
    assert floor == pytest.approx(truth["launch_s"] + truth["beside_s"], rel=0.05)

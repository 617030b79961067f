"""The decoding model: order, bounds, switches, derivatives, constants recovered."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import FP8, FP16, FP32
from hwmodels.errors import UnsupportedError
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.attention_decode import DISPATCH, EAGER, MODEL, STEP_ROWS, labels
from simulator.kernel_time.model import COLD, REPLAYED, Conditions
from simulator.kernel_time.rates import PATHS, rates_of
from simulator.kernel_time.registry import model_of
from validate.batches import Batch
from validate.fitting import Problem, fit
from workloads.ops.decode_attention import CachedAttention, DecodeAttention, MlaDecode
from workloads.ops.flash_attention import FlashAttention2

DEVICES = ("a100-sxm4-80gb", "h100-sxm", "b200-sxm", "rtx-pro-6000-blackwell-server", "t4", "p4")
RATES = [field for field in PATHS if field != "num_sms"]
LABELS = ["", *(f"x:{kernel}" for kernel in DISPATCH), "x:triton-mla" + EAGER]


def decode(**changes: Any) -> DecodeAttention:
    values: dict[str, Any] = {
        "batch": 4, "num_heads": 32, "num_kv_heads": 8, "len_kv": 4096, "head_dim": 128,
    }  # fmt: skip
    return DecodeAttention(**(values | changes))


def mla(**changes: Any) -> MlaDecode:
    values: dict[str, Any] = {"batch": 4, "num_heads": 128, "len_kv": 4096}
    return MlaDecode(**(values | changes))


def seconds(
    op: CachedAttention, device: str = "h100-sxm", kernel: str = "", l2: str = REPLAYED,
    constants: dict[str, float] | None = None, **rates: Any,
) -> Any:  # fmt: skip
    whole = rates_of(catalog.device(device))
    moved = {name: getattr(whole, name) * factor for name, factor in rates.items()}
    given = dataclasses.replace(whole, **moved)
    values = MODEL.nominal() | (constants or {})
    return MODEL.time(op, given, values, Conditions(kernel=kernel, l2=l2)).seconds


def rising(times: Any) -> bool:
    return bool(np.all(np.diff(times) >= -1e-12 * times[:-1]))


@pytest.mark.parametrize("kernel", LABELS)
@pytest.mark.parametrize("l2", [COLD, REPLAYED])
def test_no_size_makes_it_faster(kernel: str, l2: str) -> None:
    lengths = np.unique(np.round(np.geomspace(1, 200_000, 400)))
    for batch in (1, 7, 300):
        for op in (
            decode(batch=batch, len_kv=lengths),
            decode(batch=batch, num_heads=np.arange(1.0, 65.0) * 8),
            decode(batch=batch, num_heads=64, num_kv_heads=2.0 ** np.arange(7)),
            decode(batch=batch, head_dim=np.arange(8.0, 520.0, 8)),
            decode(batch=batch, window=np.arange(1.0, 5000.0, 7)),
            mla(batch=batch, len_kv=lengths),
            mla(batch=batch, num_heads=np.arange(1.0, 200.0)),
            mla(batch=batch, latent_dim=np.arange(8.0, 600.0, 8)),
        ):
            assert rising(seconds(op, kernel=kernel, l2=l2)), op
    assert rising(seconds(decode(batch=np.arange(1.0, 2000.0)), kernel=kernel, l2=l2))


@pytest.mark.parametrize("device", DEVICES[:4])
@pytest.mark.parametrize("kernel", ["", "x:mmha", "x:fa2-unsplit"])
def test_no_rate_makes_it_slower(device: str, kernel: str) -> None:
    for op in (decode(), decode(batch=512, len_kv=300), mla(), mla(batch=128, dtype=FP16)):
        for l2 in (COLD, REPLAYED):
            before = seconds(op, device, kernel, l2)
            for rate in RATES:
                after = seconds(op, device, kernel, l2, **{rate: 1.3})
                assert after <= before * (1 + 1e-12), (rate, op)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", LABELS)
def test_a_cold_kernel_is_never_faster_than_its_bound(device: str, kernel: str) -> None:
    on = catalog.device(device)
    dtype = FP32 if device == "p4" else FP16
    best = {c.name: c.high for c in MODEL.constants if c.unit != "s"} | {
        c.name: c.low for c in MODEL.constants if c.unit == "s"
    }
    for batch in (1, 40, 2000):
        lengths = np.array([1.0, 65, 1000, 50_000])
        for op in (
            decode(batch=batch, len_kv=lengths, dtype=dtype),
            decode(batch=batch, len_kv=lengths, dtype=dtype, num_heads=512, head_dim=8),
            decode(batch=batch, len_kv=lengths, dtype=dtype, window=64),
            mla(batch=batch, len_kv=lengths, dtype=dtype),
        ):
            lower_s = estimate(op, on=on, rung=BOUND).lower_s
            for constants in ({}, best):
                times = seconds(op, device, kernel, COLD, constants)
                assert np.all(times >= lower_s * (1 - 1e-12)), op


def test_only_rounds_of_blocks_make_it_jump() -> None:
    lengths = np.arange(1.0, 6000.0)
    for op in (decode(len_kv=lengths), mla(len_kv=lengths)):
        times = seconds(op)
        assert np.all(times[1:] / times[:-1] < 1.01)
        assert np.all(times[:STEP_ROWS] == pytest.approx(times[0], rel=0.02))  # a step at least
    batch = np.arange(1.0, 4000.0)
    for op in (decode(batch=batch, len_kv=100), mla(batch=batch, len_kv=100)):
        times = seconds(op)
        assert np.all((times[1:] / times[:-1])[500:] < 1.15)  # from some rounds on
    wide = np.arange(1.0, 16.0)
    assert np.all(np.diff(np.log(seconds(decode(batch=wide, len_kv=100)))) < 0.15)


def test_a_long_sequence_is_split_unless_the_kernel_cannot() -> None:
    alone = decode(batch=1, num_heads=8, num_kv_heads=1, len_kv=131_072)
    split, whole = seconds(alone), seconds(alone, kernel="x:fa2-unsplit")
    assert whole > 10 * split
    assert split < seconds(alone, kernel="x:triton") < whole
    assert seconds(alone.over(len_kv=2)) == seconds(alone.over(len_kv=2), kernel="x:fa2-unsplit")
    assert seconds(alone, constants={"split_s": 2e-5}) > split
    # MLA of vLLM's Triton kernel adds up four parts even where one would do
    slow = {"split_s": 1.0}
    assert seconds(mla(len_kv=2), kernel="x:triton-mla", constants=slow) > 1.0 > seconds(mla())


def test_a_kernel_that_packs_no_heads_reads_rows_for_every_head() -> None:
    op = decode(num_heads=512, len_kv=32_768)
    assert seconds(op, kernel="x:mmha") > 10 * seconds(op)
    single = decode(num_heads=8, len_kv=32_768)
    assert seconds(single, kernel="x:mmha") == pytest.approx(seconds(single), rel=0.05)


def test_windows_and_narrow_caches_save_time_where_bytes_bind() -> None:
    op = decode(batch=64, len_kv=65_536)
    assert seconds(op.over(window=4096)) < 0.1 * seconds(op)
    assert seconds(op.over(window=10**6)) == seconds(op)
    assert 0.4 < seconds(op.over(kv_dtype=FP8), l2=COLD) / seconds(op, l2=COLD) < 0.6


def test_a_warm_cache_is_faster_where_it_fits_the_l2() -> None:
    small, large = decode(batch=1, len_kv=2048), decode(batch=64, len_kv=65_536)
    assert seconds(small, l2=REPLAYED) < seconds(small, l2=COLD)
    assert seconds(large, l2=REPLAYED) == pytest.approx(seconds(large, l2=COLD), rel=1e-3)


def test_the_host_hides_small_kernels_that_no_graph_has_captured() -> None:
    issue_s, kernel = MODEL.nominal()["issue_s"], "x:triton-mla"
    small, large = mla(len_kv=16), mla(batch=256, len_kv=65_536)
    assert seconds(small, kernel=kernel + EAGER) == pytest.approx(issue_s, rel=0.01)
    eager = seconds(large, kernel=kernel + EAGER)
    assert eager == pytest.approx(seconds(large, kernel=kernel), rel=0.01)


def test_labels_leave_open_what_a_user_leaves_open() -> None:
    plain, named = (labels(decode(), Conditions(kernel=k)) for k in ("", "fa3"))
    assert (plain["kernel"], plain["caller"], plain["issuer"]) == ("", "", "")
    assert (named["kernel"], named["caller"]) == ("fa3", "")
    full = labels(mla(kv_dtype=FP8), Conditions(kernel="vllm:triton-mla" + EAGER))
    assert (full["kernel"], full["kv"], full["width"]) == ("triton-mla", "fp8", "wide")
    assert full["caller"] == full["issuer"] == "vllm:triton-mla" + EAGER


def test_the_registry_gives_these_ops_and_no_prefill_to_this_model() -> None:
    assert model_of(DecodeAttention) is model_of(MlaDecode) is MODEL
    assert model_of(FlashAttention2) is not MODEL


def test_a_device_without_the_format_says_so() -> None:
    with pytest.raises(UnsupportedError):
        seconds(decode(kv_dtype=FP8, product_dtype=FP8), "a100-sxm4-80gb")
    assert seconds(decode(kv_dtype=FP8), "a100-sxm4-80gb") > 0


@pytest.mark.parametrize("op", [decode(), mla(batch=64)], ids=["gqa", "mla"])
@pytest.mark.parametrize("rate", ["clock_hz", "hbm_bytes_per_s", "l2_bytes", "matmul_scale"])
def test_the_complex_step_is_the_derivative(op: CachedAttention, rate: str) -> None:
    h = 1e-6
    moved = seconds(op, **{rate: complex(1, 1e-30)}).imag / 1e-30
    central = (seconds(op, **{rate: 1 + h}) - seconds(op, **{rate: 1 - h})) / (2 * h)
    assert moved == pytest.approx(central, rel=1e-4, abs=1e-14)


def test_arrays_of_rates_and_sizes_agree_with_numbers() -> None:
    several = seconds(decode(), clock_hz=np.array([1.0, 1.5]))
    for value, factor in zip(several, (1.0, 1.5), strict=True):
        assert value == pytest.approx(seconds(decode(), clock_hz=factor), rel=1e-12)
    lengths = np.array([1.0, 500, 70_000])
    for i, length in enumerate(lengths):
        alone = seconds(mla(len_kv=length))
        assert isinstance(alone, float)
        assert seconds(mla(len_kv=lengths))[i] == pytest.approx(alone, rel=1e-12)


TRUTH = {"launch_s": 9e-6, "block_s": 3e-6, "feed_bytes_per_clk": 25.0, "hbm_frac": 0.7}


def test_fitting_generated_times_recovers_the_constants() -> None:
    rng = np.random.default_rng(7)
    kv: Any = 2.0 ** rng.integers(0, 6, 600)
    batch_sizes: Any = 2.0 ** rng.integers(0, 11, 600)
    op = DecodeAttention(
        batch=batch_sizes, num_heads=kv * 2.0 ** rng.integers(0, 4, 600), num_kv_heads=kv,
        len_kv=np.round(2 ** rng.uniform(0, 16, 600)), head_dim=128,
    )  # fmt: skip
    on, run = catalog.device("h100-sxm"), Conditions(kernel="x:k", l2=REPLAYED)
    truth = MODEL.nominal() | TRUTH
    times = np.asarray(MODEL.time(op, rates_of(on), truth, run).seconds)
    noisy = times * np.exp(0.02 * rng.standard_normal(600))
    batch = Batch("h100-sxm", op, run, np.arange(600))
    found = fit(Problem(on, (batch,), (MODEL,), noisy)).constants(MODEL)
    for name in TRUTH:
        assert found[name].value == pytest.approx(truth[name], rel=0.06), name
        assert found[name].status == "fitted"

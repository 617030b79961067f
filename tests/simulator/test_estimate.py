"""The bound rung: rooflines by hand, bounds, monotonicity, every shipped device with every op."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP8, FP16, FP32
from hwmodels.errors import InputError, UnsupportedError
from simulator.estimate import BOUND, Estimate, compute_seconds, rated
from simulator.estimate import estimate as estimate_on
from workloads import registry
from workloads.op import Op
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import Matmul
from workloads.ops.norm import RmsNorm
from workloads.ops.selective_scan import SelectiveScan
from workloads.ops.softmax import Softmax

H100, A100 = catalog.device("h100-sxm"), catalog.device("a100-sxm4-80gb")
SIZES = {"length": 64, "size": 16, "fraction": 0.5}
SIZE_BY_FIELD = {"head_dim": 64, "num_heads": 4, "num_kv_heads": 2, "len_kernel": 64}

estimate = partial(estimate_on, rung=BOUND)
"""What this file is about; the calibrated rung has tests of its own."""


def small(name: str, dtype: object = BF16) -> Op:
    """One small instance of a registered op."""
    values: dict[str, object] = {}
    for p in registry.params(name).values():
        if p.required and p.kind in SIZES:
            values[p.name] = SIZE_BY_FIELD.get(p.name, SIZES[p.kind])
        elif p.name == "dtype":
            values["dtype"] = dtype
    return registry.build(name, values)


# ---- rooflines by hand ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "peak", "bandwidth"), [(H100, 989.4e12, 3.352e12), (A100, 312e12, 2.039e12)]
)
def test_a_large_product_is_bound_by_the_tensor_cores(
    device: Device, peak: float, bandwidth: float
) -> None:
    e = estimate(Matmul(m=8192, n=8192, k=8192), on=device)
    assert e.bound == "tensor"
    assert e.lower_s == pytest.approx(2 * 8192**3 / peak, rel=1e-12)
    # 64 Mi elements a side fit no L2: each operand moves at least once, C once.
    assert e.bytes_by_level["hbm"] >= 3 * 2 * 8192**2
    assert e.seconds_by_resource["hbm"] == pytest.approx(
        e.bytes_by_level["hbm"] / bandwidth, rel=1e-12
    )


@pytest.mark.parametrize(("device", "bandwidth"), [(H100, 3.352e12), (A100, 2.039e12)])
def test_a_product_with_one_row_reads_its_weights(device: Device, bandwidth: float) -> None:
    e = estimate(Matmul(m=1, n=4096, k=4096), on=device)
    assert e.bound == "hbm"
    assert e.lower_s == pytest.approx(2 * (4096 * 4096 + 2 * 4096) / bandwidth, rel=1e-12)
    assert e.limit_frac == pytest.approx(1.0, rel=1e-12)


def test_a_pointwise_map_by_hand() -> None:
    op = Elementwise(num_elements=2**26, num_inputs=2, vector_flops_per_element=3)
    e = estimate(op, on=H100)
    assert e.seconds_by_resource["hbm"] == pytest.approx(3 * 2 * 2**26 / 3.352e12, rel=1e-12)
    assert e.seconds_by_resource["vector"] == pytest.approx(3 * 2**26 / 66.9e12, rel=1e-12)
    assert (e.bound, e.share_frac("hbm")) == ("hbm", 1.0)


def test_special_functions_by_hand() -> None:
    """H100: 16 results per clock and SM, 132 SMs at 1.98 GHz."""
    op = Elementwise(num_elements=2**20, special_ops_per_element=1000)
    e = estimate(op, on=H100)
    assert e.bound == "special"
    assert e.lower_s == pytest.approx(1000 * 2**20 / (16 * 132 * 1.98e9), rel=1e-12)


def test_the_ridge_point_lies_where_it_is_drawn() -> None:
    """Few rows against large weights: about m flops per byte, on either side of the ridge."""
    ridge = 989.4e12 / 3.352e12  # flops per byte
    for m, bound in ((int(ridge * 0.8), "hbm"), (int(ridge * 1.6), "tensor")):
        e = estimate(Matmul(m=m, n=16384, k=16384), on=H100)
        intensity = e.work.flops / e.bytes_by_level["hbm"]
        assert (intensity > ridge) == (bound == "tensor")
        assert e.bound in (bound, "smem", "l2")


def test_the_api_of_the_design() -> None:
    h200 = catalog.device("h200-sxm")
    op = FlashAttention2(
        batch=1, num_heads=32, len_q=8192, len_kv=8192, head_dim=128, dtype=BF16, causal=True
    )
    assert estimate(op, on=h200).bound == "tensor"
    lengths = 2 ** np.arange(10, 21)
    seconds = estimate(op.over(len_q=lengths, len_kv=lengths), on=h200).seconds
    assert np.shape(seconds) == (11,)
    assert np.all(np.diff(np.asarray(seconds)) > 0)


# ---- bounds --------------------------------------------------------------------------------

OPS = [
    lambda a, b, c: Matmul(m=a, n=b, k=c),
    lambda a, b, c: FlashAttention2(num_heads=4, len_q=a, len_kv=a + b, head_dim=64, causal=True),
    lambda a, b, c: RmsNorm(rows=a, cols=b),
    lambda a, b, c: Softmax(rows=a, cols=b),
    lambda a, b, c: Elementwise(num_elements=a * b, num_inputs=2, vector_flops_per_element=3),
    lambda a, b, c: SelectiveScan(batch=1, len_seq=a, channels=b, state_dim=16),
]
sizes = st.integers(1, 5000)
devices = st.sampled_from([H100, A100, catalog.device("mi300x"), catalog.device("b200-sxm")])


@settings(max_examples=60, deadline=None)
@given(make=st.sampled_from(OPS), a=sizes, b=sizes, c=sizes, device=devices)
def test_bounds_enclose_every_resource(make, a: int, b: int, c: int, device: Device) -> None:  # type: ignore[no-untyped-def]
    e = estimate(make(a, b, c), on=device)
    times = list(e.seconds_by_resource.values())
    assert min(times) >= 0
    assert e.lower_s == max(times) == e.seconds
    assert e.upper_s == pytest.approx(sum(times), rel=1e-12)
    assert e.lower_s <= e.upper_s
    assert e.seconds_by_resource[str(e.bound)] == e.lower_s
    assert 0 < e.limit_frac <= 1 + 1e-12


GROWING = {
    "matmul": (Matmul(m=300, n=500, k=700), ("m", "n", "k", "batch")),
    "attention": (
        FlashAttention2(num_heads=8, len_q=900, len_kv=900, head_dim=64),
        ("batch", "len_q", "len_kv"),
    ),
    "norm": (RmsNorm(rows=500, cols=3000), ("rows", "cols")),
    "softmax": (Softmax(rows=500, cols=3000), ("rows", "cols")),
    "map": (Elementwise(num_elements=10**6), ("num_elements", "num_inputs", "num_outputs")),
    "scan": (
        SelectiveScan(batch=2, len_seq=1000, channels=3000, state_dim=16),
        ("batch", "len_seq", "channels", "state_dim"),
    ),
}


@pytest.mark.parametrize("family", GROWING)
@pytest.mark.parametrize("device_id", ["h100-sxm", "a100-sxm4-80gb", "mi300x", "p100-sxm2"])
def test_more_work_is_never_faster(family: str, device_id: str) -> None:
    """Over finely growing sizes, ragged tiles included."""
    op, names = GROWING[family]
    device = catalog.device(device_id)
    if device_id == "p100-sxm2" and "dtype" in vars(op):
        op = op.over(dtype=FP16)
    for name in names:
        grown = np.unique(np.round(float(getattr(op, name)) * 1.13 ** np.arange(30)))
        seconds = np.asarray(estimate(op.over(**{name: grown}), on=device).lower_s)
        assert np.all(np.diff(seconds) >= -1e-12 * seconds[:-1]), (name, seconds)


@settings(max_examples=60, deadline=None)
@given(
    make=st.sampled_from(OPS),
    a=sizes,
    b=sizes,
    c=sizes,
    device=devices,
    factor=st.floats(1.0, 10.0),
)
def test_faster_hardware_is_never_slower(  # type: ignore[no-untyped-def]
    make, a: int, b: int, c: int, device: Device, factor: float
) -> None:
    op = make(a, b, c)
    before = estimate(op, on=device)
    for name, better in faster(device, factor).items():
        after = estimate(op, on=better)
        assert after.lower_s <= before.lower_s, name
        assert after.upper_s <= before.upper_s * (1 + 1e-12), name


def faster(device: Device, factor: float) -> dict[str, Device]:
    """The device with one rate raised, each in turn."""
    better = {}
    for i, level in enumerate(device.memory):
        if level.bytes_per_s is not None:
            wider = replace(level, bytes_per_s=level.bytes_per_s * factor)
            memory = (*device.memory[:i], wider, *device.memory[i + 1 :])
            better[level.name] = replace(device, memory=memory)
    tensor = {k: v * factor for k, v in device.tensor_flops_per_s.items()}
    vector = {k: v * factor for k, v in device.vector_flops_per_s.items()}
    better["tensor"] = replace(device, tensor_flops_per_s=tensor)
    better["vector"] = replace(device, vector_flops_per_s=vector)
    special = device.sm.special_ops_per_clk
    assert special is not None
    better["special"] = replace(device, sm=replace(device.sm, special_ops_per_clk=special * factor))
    return better


def test_the_binding_rate_matters() -> None:
    """The counterpart: raising what binds does help."""
    op = Matmul(m=8192, n=8192, k=8192)
    better = faster(H100, 1.25)["tensor"]
    assert estimate(op, on=better).lower_s == pytest.approx(
        estimate(op, on=H100).lower_s / 1.25, rel=1e-12
    )


# ---- arrays --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPS)
@pytest.mark.parametrize("device_id", ["h100-sxm", "mi300x", "tpu-v4"])
def test_arrays_agree_with_scalars(make, device_id: str) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(3)
    a, b, c = (np.round(10 ** rng.uniform(0.5, 4, 60)) for _ in range(3))
    device = catalog.device(device_id)
    many = estimate(make(a, b, c), on=device)
    assert np.shape(many.bound) == (60,)
    for i in range(60):
        one = estimate(make(int(a[i]), int(b[i]), int(c[i])), on=device)
        assert np.asarray(many.bound)[i] == one.bound
        for mine, theirs in ((many.lower_s, one.lower_s), (many.upper_s, one.upper_s)):
            assert np.asarray(mine)[i] == pytest.approx(theirs, rel=1e-12)
        assert np.asarray(many.limit_frac)[i] == pytest.approx(one.limit_frac, rel=1e-12)


def test_two_arrays_broadcast_to_a_plane() -> None:
    op = Matmul(m=np.array([[16.0], [4096.0]]), n=4096, k=np.array([64.0, 512.0, 4096.0]))
    e = estimate(op, on=H100)
    assert np.shape(e.lower_s) == (2, 3) == np.shape(e.bound)
    assert list(np.asarray(e.bound)[0]) == ["hbm"] * 3


# ---- every device --------------------------------------------------------------------------


@pytest.mark.parametrize("device", catalog.devices(), ids=lambda d: d.id)
def test_every_op_estimates_or_says_why_not(device: Device) -> None:
    for name in registry.names():
        for dtype in (BF16, FP16, FP32):
            op = small(name, dtype)
            try:
                e = estimate(op, on=device)
            except UnsupportedError as error:
                assert device.id in str(error)
                assert "\n" not in str(error)
                assert re.search(r"memory level|no \w+ rate|no link", str(error))
                continue
            except InputError as error:
                assert "fast memory" in str(error), f"{name}: {error}"
                continue
            check(e)


def check(e: Estimate) -> None:
    assert 0 < e.lower_s <= e.upper_s < 1
    levels = {level.name for level in e.device.memory[1:]}
    assert set(e.bytes_by_level) == levels
    for level in e.device.memory[1:]:
        named = level.name in e.unrated
        assert named == (level.bytes_per_s is None) == (level.name not in e.seconds_by_resource)
    assert ("special" in e.unrated) == (e.device.special_ops_per_s is None)
    assert ("vector" in e.unrated) == (e.device.vector_rate_flops_per_s(FP32) is None)


@pytest.mark.parametrize("name", registry.names())
def test_the_main_devices_take_every_op(name: str) -> None:
    """The sweep above would pass if everything raised; these must not."""
    for device_id in ("h100-sxm", "a100-sxm4-80gb", "h200-sxm", "b200-sxm", "mi300x", "l4"):
        check(estimate(small(name), on=catalog.device(device_id)))


def test_a_tpu_names_what_it_does_not_publish() -> None:
    e = estimate(Matmul(m=4096, n=4096, k=4096), on=catalog.device("tpu-v4"))
    assert e.bound == "tensor"
    assert set(e.unrated) == {"vector", "special", "cmem"}


def test_a_single_memory_level_has_no_roofline() -> None:
    with pytest.raises(UnsupportedError, match=r"tpu-v5p has a single memory level"):
        estimate(Matmul(m=8, n=8, k=8), on=catalog.device("tpu-v5p"))


def test_a_private_l2_adds_to_what_a_unit_holds() -> None:
    """MI300X: registers, LDS and its die's L2 stand before the shared last-level cache."""
    device = catalog.device("mi300x")
    op = Matmul(m=16384, n=16384, k=16384)
    e = estimate(op, on=device)
    held = sum(level.capacity_bytes for level in device.memory[:3])
    assert e.bytes_by_level["llc"] == op.work(held).bytes
    on_chip = sum(level.capacity_bytes * level.num_units for level in device.memory[:-1])
    assert e.bytes_by_level["hbm"] == op.work(on_chip).bytes
    assert e.bytes_by_level["hbm"] < e.bytes_by_level["llc"] < e.bytes_by_level["l2"]


def test_blackwell_tensor_memory_counts() -> None:
    device = catalog.device("b200-sxm")
    assert device.sm.tensor_memory_bytes
    op = Matmul(m=16384, n=16384, k=16384)
    without = replace(device, sm=replace(device.sm, tensor_memory_bytes=None))
    l2 = estimate(op, on=device).bytes_by_level["l2"]
    assert l2 < estimate(op, on=without).bytes_by_level["l2"]


# ---- formats -------------------------------------------------------------------------------


def test_p100_multiplies_halves_on_vector_units_and_says_so() -> None:
    e = estimate(Matmul(m=4096, n=4096, k=4096, dtype=FP16), on=catalog.device("p100-sxm2"))
    assert e.bound == "vector"
    assert "tensor" not in e.seconds_by_resource
    assert e.lower_s == pytest.approx(2 * 4096**3 / 21.2e12, rel=1e-12)
    assert len(e.notes) == 1
    assert "no tensor path for fp16" in e.notes[0]


@pytest.mark.parametrize("device_id", ["v100-sxm2-16gb", "t4"])
def test_bf16_before_ampere_is_refused(device_id: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"{device_id} has no bf16 rate; choose a format it computes: fp16"
    ):
        estimate(Matmul(m=64, n=64, k=64, dtype=BF16), on=catalog.device(device_id))


def test_fp8_needs_hopper() -> None:
    op = Matmul(m=8192, n=8192, k=8192, dtype=FP8, out_dtype=BF16)
    assert estimate(op, on=H100).lower_s == pytest.approx(2 * 8192**3 / 1978.9e12, rel=1e-12)
    with pytest.raises(UnsupportedError, match="no fp8 rate"):
        estimate(op, on=A100)


def test_work_without_tensor_flops_has_no_tensor_time() -> None:
    e = estimate(RmsNorm(rows=64, cols=64), on=H100)
    assert "tensor" not in e.seconds_by_resource
    assert compute_seconds(e.work, H100)[0]["vector"] > 0


def test_an_unrated_level_is_refused_where_its_rate_is_needed() -> None:
    device = catalog.device("t4")
    assert rated(device, device.hbm) == 320e9
    with pytest.raises(UnsupportedError, match="no bandwidth is published for level 'l2'"):
        rated(device, device.level("l2"))


def test_masked_tile_parts_cost_no_time() -> None:
    """One query more may change the tiles, and with them the masked waste, but not the bound."""
    op = FlashAttention2(num_heads=8, len_q=730, head_dim=16, causal=True)
    times = np.asarray(estimate(op.over(len_q=np.arange(600, 900)), on=H100).lower_s)
    assert (np.diff(times) > 0).all()
    e = estimate(op, on=H100)
    pairs = 8 * 730 * 731 / 2
    assert e.work.special_ops > pairs
    assert e.seconds_by_resource["special"] == pytest.approx(
        pairs / H100.special_ops_per_s, rel=0.02
    )


# ---- the limit -----------------------------------------------------------------------------


def test_the_limit_takes_all_on_chip_memory_together() -> None:
    """A bound on any algorithm may not assume that what registers hold lies in the L2 as well."""
    op = Matmul(m=2**18, n=2**18, k=2**18)
    on_chip = sum(level.capacity_bytes * level.num_units for level in A100.memory[:-1])
    slow = replace(A100.hbm, bytes_per_s=1e9)  # so slow that HBM is the limit
    e = estimate(op, on=replace(A100, memory=(*A100.memory[:-1], slow)))
    assert e.limit_s == pytest.approx(op.io_lower_bound_bytes(on_chip) / 1e9, rel=1e-12)
    assert op.io_lower_bound_bytes(on_chip) > op.compulsory_bytes()


def test_the_limit_is_the_flops_where_they_are_more() -> None:
    e = estimate(Matmul(m=8192, n=8192, k=8192), on=H100)
    assert e.limit_s == e.lower_s
    assert e.limit_frac == 1

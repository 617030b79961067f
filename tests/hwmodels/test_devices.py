"""The shipped devices: every figure sourced, consistent with each other, and right where known."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
from itertools import pairwise

import pytest

from hwmodels import catalog
from hwmodels.device import Device, matches
from hwmodels.dtypes import BF16, FP8, FP16, FP32, INT8, NVFP4

IDS = catalog.device_ids()


def figures(device: Device) -> dict[str, float]:
    """Every number of a device under its path, found by walking the dataclass, not the file."""
    found: dict[str, float] = {}

    def walk(path: str, value: object) -> None:
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return
        if isinstance(value, int | float):
            found[path] = value
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(f"{path}.{field.name}" if path else field.name, getattr(value, field.name))
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}.{key}", item)
        elif isinstance(value, tuple):
            for item in value:
                if dataclasses.is_dataclass(item):
                    walk(f"{path}.{item.name}", item)  # type: ignore[attr-defined]

    walk("", device)
    return found


def test_catalogue_holds_forty_researched_parts_and_those_the_measurements_name() -> None:
    assert len(IDS) == 49
    for added in (
        "p4", "p100-pcie-16gb", "v100-pcie-16gb", "v100-pcie-32gb", "m40", "titan-xp",
        "gtx-1080-ti", "h100-sxm-96gb", "gh200-144gb",
    ):  # fmt: skip
        assert added in IDS


@pytest.mark.parametrize("device_id", IDS)
def test_every_figure_has_a_source(device_id: str) -> None:
    device = catalog.device(device_id)
    assert device.id == device_id
    # One unit of a level is no figure, nor is a factor of one that says "no sparsity".
    follows = {f"memory.{level.name}.num_units" for level in device.memory if level.num_units == 1}
    if device.sparsity_factor == 1:
        follows.add("sparsity_factor")
    unsourced = [p for p in figures(device) if p not in follows and not device.source_of(p)]
    assert not unsourced


@pytest.mark.parametrize("device_id", IDS)
def test_citations_name_their_kind_and_no_blanket_covers_a_whole_file(device_id: str) -> None:
    kinds = ("checked:", "recalled:", "computed:", "derived:", "inferred:", "measured,",
             "by analogy:", "as memory.")  # fmt: skip
    for path, citation in catalog.device(device_id).sources.items():
        assert path not in ("*", "memory.*")
        assert citation.startswith(kinds), (path, citation)
        assert len(citation) > 15


@pytest.mark.parametrize("device_id", IDS)
def test_every_device_states_its_doubts(device_id: str) -> None:
    assert catalog.device(device_id).doubts


def test_a_path_with_no_citation_has_no_source() -> None:
    assert catalog.device("h100-sxm").source_of("memory.l7.bytes_per_s") is None


# Peaks that the vendor quotes at the boost clock, not at the tensor clock of the other formats.
AT_BOOST = {
    (name, "fp64_acc_fp64")
    for name in (
        "h100-sxm", "h100-pcie", "h100-nvl", "h100-sxm-96gb", "h200-sxm", "gh200-96gb",
        "gh200-144gb", "b200-sxm",
    )
} | {("b300-sxm", "int8_acc_int32")}  # fmt: skip
# int8 of GB300 implies a boost clock that nobody has published (its `doubts` say so).
UNRESOLVED = {("gb300", "int8_acc_int32")}


@pytest.mark.parametrize("device_id", IDS)
def test_tensor_peaks_agree_with_the_per_clock_rates(device_id: str) -> None:
    device = catalog.device(device_id)
    tensor_clock = device.tensor_clock_hz or device.clock_hz
    for key, per_clk in device.sm.tensor_flops_per_clk.items():
        if key not in device.tensor_flops_per_s or (device_id, key) in UNRESOLVED:
            continue
        clock = device.clock_hz if (device_id, key) in AT_BOOST else tensor_clock
        quoted, computed = device.tensor_flops_per_s[key], per_clk * device.num_sms * clock
        assert math.isclose(quoted, computed, rel_tol=0.03), (key, quoted, computed)


def test_the_exceptions_to_the_peak_check_are_real() -> None:
    for device_id, key in AT_BOOST | UNRESOLVED:
        device = catalog.device(device_id)
        rate = device.sm.tensor_flops_per_clk[key] * device.num_sms * (device.tensor_clock_hz or 0)
        assert not math.isclose(device.tensor_flops_per_s[key], rate, rel_tol=0.03)


@pytest.mark.parametrize("device_id", IDS)
def test_levels_widen_and_slow_down_outwards(device_id: str) -> None:
    """From shared memory outwards each unit holds more; bandwidth never rises.

    Totals need not grow: the register files of an SM hold more than its shared memory, and
    all shared memories of a V100 more than its L2.
    """
    device = catalog.device(device_id)
    levels = [level for level in device.memory if level.name != "register"]
    for inner, outer in pairwise(levels):
        assert outer.capacity_bytes > inner.capacity_bytes
    rates = [level.bytes_per_s for level in levels if level.bytes_per_s is not None]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates)
    assert device.hbm.name == "hbm"
    assert device.hbm.num_units == 1


@pytest.mark.parametrize("device_id", IDS)
def test_bus_width_times_pin_rate_gives_the_memory_bandwidth(device_id: str) -> None:
    device = catalog.device(device_id)
    width = device.extra.get("hbm_bus_width_bits")
    rate = device.extra.get("hbm_bits_per_s_per_pin")
    if isinstance(width, float) and isinstance(rate, float):
        assert math.isclose(width * rate / 8, device.hbm.bytes_per_s or 0, rel_tol=0.025)


@pytest.mark.parametrize("device_id", IDS)
def test_measured_never_exceeds_what_is_specified(device_id: str) -> None:
    device = catalog.device(device_id)
    stream = device.measured.get("hbm_stream_bytes_per_s", 0)
    assert stream <= (device.hbm.bytes_per_s or 0)
    assert device.measured.get("visible_capacity_bytes", 0) <= device.hbm.capacity_bytes
    bf16 = device.measured.get("bf16_matmul_flops_per_s")
    assert bf16 is None or bf16 < (device.tensor_rate_flops_per_s(BF16) or 0)


def test_spot_values() -> None:
    h100 = catalog.device("h100-sxm")
    assert (h100.num_sms, h100.clock_hz, h100.tensor_clock_hz) == (132, 1.98e9, 1.83e9)
    assert h100.tensor_rate_flops_per_s(BF16) == 989.4e12
    assert h100.hbm.bytes_per_s == 3.352e12
    assert h100.level("l2").capacity_bytes == 50 * 2**20
    assert h100.level("smem").bytes_per_s == 128 * 132 * 1.98e9
    assert h100.level("smem").num_units == h100.level("register").num_units == 132
    assert (h100.sm.smem_bytes, h100.sm.smem_bytes_per_block) == (228 * 1024, 227 * 1024)
    assert h100.sm.register_file_bytes == 64 * 1024 * 4
    assert "derived: 128 bytes per clock" in (h100.source_of("memory.smem.bytes_per_s") or "")
    assert "derived: one per SM; checked" in (h100.source_of("memory.smem.num_units") or "")
    assert "arch_traits.h" in (h100.source_of("sm.smem_bytes") or "")
    assert catalog.device("v100-sxm2-16gb").tensor_rate_flops_per_s(FP16) == 125.3e12
    assert catalog.device("p4").vector_rate_flops_per_s(INT8) == 22e12
    assert catalog.device("p100-sxm2").matmul_rate_flops_per_s(FP16) == (21.2e12, "vector")
    assert catalog.device("mi300x").level("l2").num_units == 8
    assert catalog.device("mi300x").level("llc").capacity_bytes == 256 * 2**20
    assert catalog.device("b300-sxm").tensor_rate_flops_per_s(NVFP4) == 13.5e15
    assert catalog.device("gh200-144gb").hbm.bytes_per_s == 4.9e12
    assert catalog.device("h100-sxm-96gb").hbm.bytes_per_s == 2.4e12
    assert [link.name for link in catalog.device("gb200").links] == ["nvlink", "c2c", "pcie"]


# Wrong public entries (value) beside what is right; the catalogue must hold the right one.
RIGHT = {
    "h100 bf16 is dense, not 1979": ("h100-sxm", "tensor_flops_per_s.bf16_acc_fp32", 989.4e12),
    "h100 tf32 is not the A100's 156": ("h100-sxm", "tensor_flops_per_s.tf32_acc_fp32", 494.7e12),
    "l4 fp16 is dense, not 242": ("l4", "tensor_flops_per_s.fp16_acc_fp32", 121e12),
    "l4 memory is not 3350 GB/s": ("l4", "memory.hbm.bytes_per_s", 300e9),
    "l4 has 58 SM, not 60": ("l4", "num_sms", 58),
    "a10 memory is not the A30's 933": ("a10", "memory.hbm.bytes_per_s", 600e9),
    "t4 memory is 320, not 300": ("t4", "memory.hbm.bytes_per_s", 320e9),
    "a100 80 GB is 2039, not 2048": ("a100-sxm4-80gb", "memory.hbm.bytes_per_s", 2.039e12),
    "a100 40 GB is 1555, not 1600": ("a100-sxm4-40gb", "memory.hbm.bytes_per_s", 1.555e12),
    "h100 memory is 3352, not 3072": ("h100-sxm", "memory.hbm.bytes_per_s", 3.352e12),
    "v100 sxm2 is 125, not 112": ("v100-sxm2-16gb", "tensor_flops_per_s.fp16_acc_fp32", 125e12),
    "gh200 is 989, not 1979": ("gh200-96gb", "tensor_flops_per_s.bf16_acc_fp32", 989.4e12),
    "gb200 is 2500, not 4500": ("gb200", "tensor_flops_per_s.bf16_acc_fp32", 2500e12),
    "a100 nvlink is 300 one way": ("a100-sxm4-80gb", "links.nvlink.bytes_per_s", 300e9),
    "h100 nvlink is 450 one way": ("h100-sxm", "links.nvlink.bytes_per_s", 450e9),
    "tpu v5p ici is 600 one way": ("tpu-v5p", "links.ici.bytes_per_s", 600e9),
    "tpu v6e is 918, not 926": ("tpu-v6e", "tensor_flops_per_s.bf16_acc_fp32", 918e12),
    "tpu v3 is 123, not 140": ("tpu-v3", "tensor_flops_per_s.bf16_acc_fp32", 123e12),
    "h200 is 989, not 1979": ("h200-sxm", "tensor_flops_per_s.bf16_acc_fp32", 989.4e12),
    "a800 is 312, not 320": ("a800-sxm4-80gb", "tensor_flops_per_s.bf16_acc_fp32", 312e12),
    "b200 holds 180, not 80": ("b200-sxm", "memory.hbm.capacity_bytes", 180 * 2**30),
    "a100 has 108 SM, not 128": ("a100-sxm4-80gb", "num_sms", 108),
    "a100 l2 is 40 MiB, not 48": ("a100-sxm4-80gb", "memory.l2.capacity_bytes", 40 * 2**20),
    "mi210 runs at 1700 MHz": ("mi210", "clock_hz", 1.7e9),
    "mi210 has 3 links of 50": ("mi210", "links.xgmi.bytes_per_s", 150e9),
    "mi250x l2 is 8 MiB per die": ("mi250x", "memory.l2.capacity_bytes", 8 * 2**20),
    "gb300 int8 is gutted": ("gb300", "tensor_flops_per_s.int8_acc_int32", 165e12),
    "b200 fp32 is 74-75, not 80": ("b200-sxm", "vector_flops_per_s.fp32", 74.4e12),
    "b200 nvfp4 is 9000": ("b200-sxm", "tensor_flops_per_s.nvfp4_acc_fp32", 9000e12),
    "rtx pro server 1597": ("rtx-pro-6000-blackwell-server", "memory.hbm.bytes_per_s", 1.597e12),
    "b200 hosts are pcie gen5": ("b200-sxm", "links.pcie.generation", 5),
    "h800 sxm is 989, not 756": ("h800-sxm", "tensor_flops_per_s.bf16_acc_fp32", 989.4e12),
    "mi325x is 1307, not 1614": ("mi325x", "tensor_flops_per_s.bf16_acc_fp32", 1307.4e12),
    "mi325x holds 256 GB": ("mi325x", "memory.hbm.capacity_bytes", 256 * 2**30),
    "sm_120 blocks have 99 KB": ("rtx-5090", "sm.smem_bytes_per_block", 99 * 1024),
    "rtx 4090 fp8/fp32 is 330.3": ("rtx-4090", "tensor_flops_per_s.fp8_acc_fp32", 330.3e12),
    "b200 has 148 SM, not 192": ("b200-sxm", "num_sms", 148),
    "b200 l2 is 126.5 MiB": ("b200-sxm", "memory.l2.capacity_bytes", 126.5 * 2**20),
    "l40s bf16 is 362, not 183": ("l40s", "tensor_flops_per_s.bf16_acc_fp32", 362e12),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_no_known_wrong_public_entry(case: str) -> None:
    device_id, path, right = RIGHT[case]
    assert math.isclose(figures(catalog.device(device_id))[path], right, rel_tol=0.004)


def test_block_scaled_formats_and_absent_ones() -> None:
    assert catalog.device("a100-sxm4-80gb").tensor_rate_flops_per_s(FP8) is None
    assert catalog.device("h100-pcie").hbm.technology == "HBM2e"
    assert catalog.device("t4").vector_rate_flops_per_s(FP32) == 8.1e12


def test_devices_are_hashable_picklable_and_read_only() -> None:
    device = catalog.device("h100-sxm")
    assert hash(device) == hash(pickle.loads(pickle.dumps(device)))
    assert pickle.loads(pickle.dumps(device)) == device
    assert dataclasses.asdict(device)["measured"] == dict(device.measured)
    with pytest.raises(TypeError, match="read-only"):
        device.tensor_flops_per_s["bf16_acc_fp32"] = 1.0  # type: ignore[index]
    with pytest.raises(TypeError, match="read-only"):
        device.measured.update(x=1.0)  # type: ignore[attr-defined]


def test_files_are_written_in_si_and_speak_of_no_tools() -> None:
    forbidden = re.compile(r"\[read\]|\[recalled\]|_gb\b|_mhz|tflops", re.I)
    for path in catalog.DATA.rglob("*.toml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not forbidden.search(line.split(" = ")[0]), (path.name, line)
            assert not re.search(r"\[read", line), (path.name, line)


@pytest.mark.parametrize(
    ("path", "pattern", "meant"),
    [
        ("memory.hbm.bytes_per_s", "memory.hbm.bytes_per_s", True),
        ("memory.hbm.bytes_per_s", "memory.*", True),
        ("memory.hbm.bytes_per_s", "memory.*.bytes_per_s", True),
        ("memory.hbm.bytes_per_s", "*.bytes_per_s", True),
        ("memory.hbm.bytes_per_s", "*.latency_s", False),
        ("memory.hbm.bytes_per_s", "links.*", False),
        ("memory.hbm.bytes_per_s", "memory.hbm", False),
        ("memory.hbm.bytes_per_s", "m*.h*.b*", True),
        ("aba", "ab*ba", False),
        ("num_sms", "num_sm?", True),
    ],
)
def test_source_patterns(path: str, pattern: str, meant: bool) -> None:
    assert matches(path, pattern) is meant


def test_the_most_specific_citation_wins() -> None:
    device = catalog.device("h100-sxm")
    assert "FlashAttention-4" in (device.source_of("sm.special_ops_per_clk") or "")
    assert "arch_traits.h" in (device.source_of("sm.max_warps") or "")
    assert "gpu-benches" in (device.source_of("memory.l2.latency_s") or "")
    assert "gpu-benches" not in (device.source_of("memory.l2.capacity_bytes") or "")

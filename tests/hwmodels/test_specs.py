"""Bad specification files: each gives one line that names the file, the key and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.errors import InputError, SpecError
from hwmodels.specs import read_device

GOOD = """
schema = 1
id = "toy"
name = "Toy accelerator"
vendor = "Acme"
architecture = "Toy"
num_sms = 4
clock_hz = 1e9

[tensor_flops_per_s]
bf16_acc_fp32 = 8e12

[vector_flops_per_s]
fp32 = 1e12

[[memory]]
name = "smem"
per_sm = true
capacity_bytes = 65536
bytes_per_clk = 128

[[memory]]
name = "hbm"
capacity_bytes = 16e9
bytes_per_s = 400e9
latency_s = 400e-9

[[links]]
name = "pcie"
bytes_per_s = 31.5e9

[sources]
"*" = "Acme datasheet"
"""

# (what to replace, by what, what the key must be, words of the problem, words of the mend)
BAD = {
    "unknown key": ("clock_hz = 1e9", "clock_hz = 1e9\nclok_hz = 1e9", "clok_hz",
                    "unknown key", "clock_hz"),
    "near key": ("num_sms = 4", "num_sm = 4", "num_sm", "unknown key", "num_sms"),
    "bandwidth": ("bytes_per_s = 400e9", "bandwidth = 400", "memory.hbm.bandwidth", "unknown key",
                  "give it as bytes_per_s in SI base units"),
    "unit in the key": ("bytes_per_s = 400e9", "bandwidth_gb_per_s = 400",
                        "memory.hbm.bandwidth_gb_per_s", "unknown key",
                        "give it as bytes_per_s in SI base units"),
    "gigabytes in the key": ("capacity_bytes = 16e9", "capacity_gb = 16", "memory.hbm.capacity_gb",
                             "unknown key", "give it as capacity_bytes in SI base units"),
    "megahertz in the key": ("clock_hz = 1e9", "clock_mhz = 1000", "clock_mhz", "unknown key",
                             "give it as clock_hz in SI base units"),
    "nanoseconds in the key": ("latency_s = 400e-9", "latency_ns = 400", "memory.hbm.latency_ns",
                               "unknown key", "give it as latency_s in SI base units"),
    "watts": ("clock_hz = 1e9", "clock_hz = 1e9\ntdp_watts = 300", "tdp_watts", "unknown key",
              "give it as tdp_w in SI base units"),
    "top-level bandwidth": ("clock_hz = 1e9", "clock_hz = 1e9\nbandwidth = 3", "bandwidth",
                            "unknown key", "bytes_per_s in SI base units"),
    "gigabytes in the value": ("bytes_per_s = 400e9", "bytes_per_s = 400", "memory.hbm.bytes_per_s",
                               "400 looks like another unit", "bytes per second"),
    "megahertz in the value": ("clock_hz = 1e9", "clock_hz = 1000", "clock_hz",
                               "1000 looks like another unit", "hertz"),
    "teraflops in the value": ("bf16_acc_fp32 = 8e12", "bf16_acc_fp32 = 8",
                               "tensor_flops_per_s.bf16_acc_fp32", "looks like another unit",
                               "operations per second"),
    "nanoseconds in the value": ("latency_s = 400e-9", "latency_s = 400", "memory.hbm.latency_s",
                                 "looks like another unit", "seconds"),
    "gigabytes of capacity": ("capacity_bytes = 16e9", "capacity_bytes = 16",
                              "memory.hbm.capacity_bytes", "looks like another unit", "bytes"),
    "missing figure": ("clock_hz = 1e9", "", "clock_hz", "missing", "add clock_hz"),
    "missing name": ('name = "Toy accelerator"', "", "name", "missing", "add name"),
    "missing capacity": ("capacity_bytes = 16e9", "", "memory.hbm.capacity_bytes", "missing",
                         "add capacity_bytes"),
    "missing bandwidth": ("bytes_per_s = 400e9", "", "memory.hbm.bytes_per_s", "missing", "SI"),
    "missing schema": ("schema = 1", "", "schema", "missing", "schema = 1"),
    "other schema": ("schema = 1", "schema = 2", "schema", "is 2", "schema = 1"),
    "no device memory": ('name = "hbm"', 'name = "dram"', "memory", "no device memory", '"hbm"'),
    "levels in the wrong order": ("bytes_per_s = 400e9", "bytes_per_s = 400e12",
                                  "memory.hbm.bytes_per_s", "above that of the level before",
                                  "fastest first"),
    "a level twice": ('name = "smem"', 'name = "hbm"', "memory.hbm", "stands twice", "own name"),
    "text for a figure": ("bytes_per_s = 400e9", 'bytes_per_s = "400GB/s"',
                          "memory.hbm.bytes_per_s", "400GB/s (text)", "bare number"),
    "number for a text": ('vendor = "Acme"', "vendor = 3", "vendor", "is 3", "give a text"),
    "empty text": ('vendor = "Acme"', 'vendor = ""', "vendor", "is empty", "give a text"),
    "list for a figure": ("num_sms = 4", "num_sms = [4]", "num_sms", "(list)", "bare number"),
    "date for a figure": ("num_sms = 4", "num_sms = 1979-05-27", "num_sms", "(date)", "bare"),
    "truth value for a figure": ("num_sms = 4", "num_sms = true", "num_sms", "(bool)",
                                 "bare number"),
    "fraction of an SM": ("num_sms = 4", "num_sms = 4.5", "num_sms", "is 4.5", "whole number"),
    "negative": ("bytes_per_s = 400e9", "bytes_per_s = -400e9", "memory.hbm.bytes_per_s",
                 "is -4e+11", "positive"),
    "zero": ("num_sms = 4", "num_sms = 0", "num_sms", "is 0", "positive"),
    "infinite": ("clock_hz = 1e9", "clock_hz = inf", "clock_hz", "is inf", "finite"),
    "not a number": ("clock_hz = 1e9", "clock_hz = nan", "clock_hz", "is nan", "finite"),
    "far too large": ("num_sms = 4", f"num_sms = {10**400}", "num_sms", "is 1000", "finite"),
    "table for a list of tables": ("[[links]]", "[links]", "links", "not a list of tables",
                                   "[[links]]"),
    "unknown format": ("fp32 = 1e12", "fp33 = 1e12", "vector_flops_per_s.fp33",
                       "unknown number format", "fp32"),
    "rate without accumulator": ("bf16_acc_fp32 = 8e12", "bf16 = 8e12", "tensor_flops_per_s.bf16",
                                 "unknown rate", "bf16_acc_fp32"),
    "two bandwidths": ("bytes_per_clk = 128", "bytes_per_clk = 128\nbytes_per_s = 1e12",
                       "memory.smem.bytes_per_clk", "stands beside", "keep one"),
    "two unit counts": ("per_sm = true", "per_sm = true\nnum_units = 2", "memory.smem.num_units",
                        "stands beside", "keep one"),
    "figure without source": ('"*" = "Acme datasheet"',
                              '"memory.*" = "d"\n"links.*" = "d"\n"*flops*" = "d"\nnum_sms = "d"',
                              "clock_hz", "has no source", "under [sources]"),
    "citation without figure": ('"*" = "Acme datasheet"', '"*" = "d"\n"memory.hmb.*" = "d"',
                                "sources.memory.hmb.*", "matches no figure", ""),
    "empty citation": ('"*" = "Acme datasheet"', '"*" = " "', "sources.*", "is empty", "text"),
    "bad sparsity": ("num_sms = 4", "num_sms = 4\nsparsity_factor = 0.5", "sparsity_factor",
                     "is 0.5", "1 or more"),
    "newline in a key": ("num_sms = 4", 'num_sms = 4\n"a\\nb" = 1', "a b", "unknown key", "known"),
    "shared memory twice": ("[[links]]", "[sm]\nsmem_bytes = 1024\n\n[[links]]", "sm.smem_bytes",
                            "differs from memory.smem", "one place"),
}  # fmt: skip


def write(folder: Path, text: str) -> Path:
    path = folder / "toy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def one_line_of(error: pytest.ExceptionInfo[SpecError], path: Path) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert error.value.mend
    assert len(message) < 400 + len(str(path))
    return message


def test_the_good_file_is_good(tmp_path: Path) -> None:
    device = catalog.device(str(write(tmp_path, GOOD)))
    assert device.id == "toy"
    assert device.hbm.bytes_per_s == 400e9
    assert device.level("smem").bytes_per_s == 128 * 4 * 1e9
    assert device.sm.smem_bytes == 65536
    assert device.source_of("memory.hbm.latency_s") == "Acme datasheet"


@pytest.mark.parametrize("case", BAD)
def test_bad_file(case: str, tmp_path: Path) -> None:
    old, new, key, problem, mend = BAD[case]
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(SpecError) as error:
        read_device(path)
    one_line_of(error, path)
    assert error.value.key == key
    assert problem in error.value.problem
    assert mend in error.value.mend


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe\x00s", "not UTF-8"),
        (GOOD[: GOOD.index("Toy acc") + 3].encode(), "not valid TOML"),
        (b"schema = 1\nid = = 2", "not valid TOML"),
        (b"schema = 1\nschema = 1", "not valid TOML"),
        (b"a = " + b"[" * 5000, "nests too deeply"),
        (b"schema = " + b"1" * 5000, "not valid TOML"),
        (b"\x00\x00", "not valid TOML"),
    ],
)
def test_unreadable_content(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_bytes(content)
    with pytest.raises(SpecError) as error:
        read_device(path)
    one_line_of(error, path)
    assert problem in error.value.problem


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="schema: missing"):
        read_device(write(tmp_path, ""))


def test_unreadable_path(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"does not exist; check the path"):
        catalog.device(str(tmp_path / "none.toml"))
    with pytest.raises(SpecError, match=r"is not a regular file"):
        catalog.device(tmp_path)
    with pytest.raises(SpecError):
        catalog.device("/" + "x" * 5000 + ".toml")


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=0, max_value=len(GOOD) - 1))
def test_a_truncated_file_is_refused_in_one_line(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "toy.toml"
    path.write_text(GOOD[:cut], encoding="utf-8")
    if GOOD[cut:].strip() == "":
        return
    with pytest.raises(InputError) as error:
        read_device(path)
    assert "\n" not in str(error.value)

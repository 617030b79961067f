"""What people read: complete, and never wider than the terminal or 100 columns."""

from __future__ import annotations

import re

import pytest

from cli.main import main
from hwmodels import catalog

FLASH = ("flash_attention_2", "-p", "heads=32", "-p", "seq=8k", "-p", "dim=128")
COMMANDS = {
    "devices": ("devices",),
    "device": ("devices", "h100-sxm"),
    "mi300x": ("devices", "mi300x"),
    "clusters": ("clusters",),
    "cluster": ("clusters", "hgx-h100", "--nodes", "8"),
    "systems": ("systems",),
    "estimate": ("estimate", *FLASH, "-d", "h100-sxm"),
    "estimate on t4": ("estimate", *FLASH, "-p", "dtype=fp16", "-d", "t4"),
    "estimate on a tpu": ("estimate", *FLASH, "-d", "tpu-v5e"),
    "sweep": (
        "sweep", "attention", "flash_attention_2", "-p", "heads=32", "-p", "dim=128",
        "--over", "seq=256:1M:x2", "-d", "h100-sxm", "-d", "a100-sxm4-80gb", "-d", "b200-sxm",
    ),
    "roofline": ("roofline", *FLASH, "-d", "h100-sxm", "-d", "mi300x"),
}  # fmt: skip


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("case", COMMANDS)
def test_nothing_is_wider_than_the_page(
    case: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(COMMANDS[case]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(len(line) for line in out.splitlines()) <= min(columns, 100)
    assert "\x1b" not in out  # no colour codes in a pipe


def test_devices_lists_every_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["devices"]) == 0
    out = capsys.readouterr().out
    assert all(device_id in out for device_id in catalog.device_ids())


def test_one_device_shows_figures_sources_and_doubts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["devices", "H100-SXM"]) == 0
    out = capsys.readouterr().out
    device = catalog.device("h100-sxm")
    assert "memory.hbm.bytes_per_s" in out and "3.35 TB/s" in out
    assert out.count("\n- ") == len(device.doubts) > 0
    assert "aiconfigurator" in out


def test_an_estimate_names_its_rung_its_bound_and_its_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["estimate", "matmul", "-p", "m=8192", "-p", "n=8192", "-p", "k=8192",
                 "-d", "h100-sxm", "--rung", "bound"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    # 2 * 8192^3 / 989.4e12 = 1.111 ms
    assert "1.11 ms .. " in out
    for part in (
        "matmul on h100-sxm", "bound: roofline", "bound by tensor units", "1.10 TFLOP",
        "989 TFLOP/s", "100 % <", "hbm bytes", "l2 bytes", "smem bytes", "Ceiling", "Intensity",
        "Limit", "lower bound", "tensor_flops_per_s.bf16_acc_fp32",
    ):  # fmt: skip
        assert part in out, part


def test_a_prediction_names_its_interval_its_donor_and_its_distance_from_the_roofline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ("-p", "m=8192", "-p", "n=8192", "-p", "k=8192")
    assert main(["estimate", "matmul", *sizes, "-d", "h200-sxm", "--sensitivity"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Time [\d.]+ ms; 80 % of kernels in [\d.]+ ms \.\. [\d.]+ ms, 90 %", out)
    assert "calibrated: borrowed from h100-sxm: same architecture" in out
    assert re.search(r"Roofline 1\.11 ms .. [\d.]+ ms, bound by tensor units; the time is 1\.", out)
    assert re.search(r"tensor_flops_per_s -0\.\d\d %", out)


def test_a_device_that_is_no_gpu_gets_its_bound_and_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["estimate", *FLASH, "-d", "tpu-v4"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "bound: roofline" in out and "no prediction beyond the bound: tpu-v4" in out


def test_no_share_of_the_bound_is_above_100_percent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *FLASH, "-p", "causal=true", "-d", "h100-sxm"]) == 0
    out = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"([\d.]+) %(?: <)? *$", out, re.M)]
    assert len(shares) == 6
    assert max(shares) == 100
    assert re.search(r"Tiles +compute \d[.\d]* % more, masked out", out)
    assert main(["estimate", *FLASH, "-d", "h100-sxm", "--rung", "bound"]) == 0
    assert "can exceed the second" in " ".join(capsys.readouterr().out.split())
    assert main(["estimate", *FLASH, "-d", "h100-sxm"]) == 0
    assert "Tiles" not in capsys.readouterr().out


def test_a_missing_tensor_path_and_unrated_levels_are_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["estimate", *FLASH, "-p", "dtype=fp32", "-d", "v100-sxm2-16gb"]) == 0
    out = capsys.readouterr().out
    assert "no tensor path for fp32" in out
    assert "vector_flops_per_s.fp32" in out


def test_a_sweep_tells_where_ops_cross(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("heads=32", "batch=1", "dim=128", "channels=4096")
    params = [part for word in words for part in ("-p", word)]
    ops = ("mamba_scan", "flash_attention_2")
    assert main(["sweep", *ops, *params, "--over", "seq=128:64k:x2"]) == 0
    out = capsys.readouterr().out
    assert "mamba_scan is faster than flash_attention_2 on h100-sxm" in out


def test_a_long_sweep_shows_some_rows_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "matmul", "-p", "n=64", "-p", "k=64", "--over", "m=1:5000:+1"]) == 0
    out = capsys.readouterr().out
    assert "48 of 5,000 rows shown" in out
    assert out.count("\n") < 70
    assert "\n     1 " in out and "\n 5,000 " in out


def test_systems_counts_what_it_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems"]) == 0
    out = capsys.readouterr().out
    assert "124 systems: " in out
    assert "hydragen" in out and "Plain ops" in out


def test_an_op_of_several_kernels_names_them_and_its_tile(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["estimate", "attention", *FLASH[1:], "-d", "h100-sxm", "--fast-memory", "100KB"]
    assert main(asked) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Stages softmax .* scores .* output .*, one after another", out)
    assert re.search(r"In 100 kB tile: scores_tm \d+.*; moves [\d.]+ GB, [\d.]+ x the lower", out)

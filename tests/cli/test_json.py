"""The contract with programs: version 1, these keys, exact numbers, nothing else on stdout."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from hwmodels import catalog
from hwmodels.dtypes import BF16
from simulator.estimate import estimate
from workloads.ops.matmul import Matmul

SIZES = ("-p", "m=1234", "-p", "n=4097", "-p", "k=777")


def document(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert next(iter(found)) == "version"
    assert found["version"] == 1
    return found


def test_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "estimate", "matmul", *SIZES, "-d", "h100-sxm")
    e = estimate(Matmul(m=1234, n=4097, k=777), on=catalog.device("h100-sxm"))
    assert set(found) == {
        "version", "op", "params", "device", "rung", "seconds", "lower_s", "upper_s", "bound",
        "seconds_by_resource", "bytes_by_level", "work", "compulsory_bytes",
        "io_lower_bound_bytes", "limit_s", "limit_frac", "unrated", "notes", "sources",
        "low_80_s", "high_80_s", "low_90_s", "high_90_s", "terms_s", "regime", "calibration",
    }  # fmt: skip
    assert found["params"] == {
        "m": 1234, "n": 4097, "k": 777, "batch": 1, "dtype": "bf16", "out_dtype": None,
        "math_dtype": None,
    }  # fmt: skip
    assert found["rung"] == "calibrated" and found["seconds"] == e.seconds > e.lower_s
    assert (found["low_80_s"], found["high_80_s"]) == e.interval(80)
    assert found["low_90_s"] < found["low_80_s"] < found["seconds"] < found["high_80_s"]
    assert found["calibration"]["devices"] == ["h100-sxm"]
    assert found["calibration"]["scope"] == "own" and found["calibration"]["num_rows"] > 500
    assert found["regime"] in found["terms_s"]
    assert found["lower_s"] == e.lower_s
    assert found["upper_s"] == e.upper_s
    assert found["bound"] == e.bound
    assert found["seconds_by_resource"] == dict(e.seconds_by_resource)
    assert found["bytes_by_level"] == dict(e.bytes_by_level)
    assert found["work"]["tensor_flops"] == {"bf16": 2 * 1234 * 4097 * 777}
    assert set(found["work"]) == {
        "tensor_flops", "vector_flops", "special_ops", "needed_tensor_flops",
        "needed_vector_flops", "needed_special_ops", "read_bytes", "write_bytes", "launches",
    }  # fmt: skip
    for kind in ("tensor_flops", "vector_flops", "special_ops"):  # nothing is masked here
        assert found["work"][f"needed_{kind}"] == found["work"][kind]
    assert found["limit_s"] == e.limit_s
    assert found["limit_frac"] == e.limit_frac
    assert set(found["sources"]) == set(found["seconds_by_resource"])
    hbm = found["sources"]["hbm"]
    assert hbm["figure"] == "memory.hbm.bytes_per_s"
    assert hbm["value"] == e.device.hbm.bytes_per_s
    assert hbm["source"]


def test_what_a_mask_drops_is_counted_but_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("heads=32", "seq=8k", "dim=128", "causal=true")
    params = [part for word in words for part in ("-p", word)]
    found = document(capsys, "estimate", "flash_attention_2", *params, "-d", "h100-sxm")
    work = found["work"]
    pairs = 8192 * 8193 / 2
    assert work["needed_tensor_flops"] == {"bf16": 4 * 128 * 32 * pairs}
    assert work["tensor_flops"]["bf16"] > work["needed_tensor_flops"]["bf16"]
    rates = {name: source["value"] for name, source in found["sources"].items()}
    seconds = found["seconds_by_resource"]
    needed = work["needed_tensor_flops"]["bf16"]
    assert seconds["tensor"] == pytest.approx(needed / rates["tensor"], rel=1e-12)
    assert seconds["vector"] == pytest.approx(
        work["needed_vector_flops"] / rates["vector"], rel=1e-12
    )
    assert found["lower_s"] == max(seconds.values())


def test_a_masked_op_lies_under_its_roofs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("heads=32", "seq=8k", "dim=128", "causal=true")
    params = [part for word in words for part in ("-p", word)]
    found = document(capsys, "roofline", "flash_attention_2", *params, "-d", "h100-sxm")
    (place,) = found["places"]
    top = max(c["flops_per_s"] for c in found["devices"][0]["compute_roofs"])
    assert place["bound"] == ["tensor"]
    assert place["flops_per_s"][0] == pytest.approx(top, rel=1e-12)


@pytest.mark.parametrize("device_id", catalog.device_ids())
def test_every_resource_of_every_device_has_a_sourced_figure(
    device_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = catalog.device(device_id)
    dtype = "bf16" if device.tensor_rate_flops_per_s(BF16) else "fp32"
    if len(device.memory) == 1:
        assert main(["estimate", "matmul", *SIZES, "-d", device_id]) == 2
        assert "single memory level" in capsys.readouterr().err
        return
    found = document(capsys, "estimate", "matmul", *SIZES, "-p", f"dtype={dtype}", "-d", device_id)
    for resource, source in found["sources"].items():
        assert source["value"], resource
        assert source["source"], (resource, source)


@pytest.mark.parametrize(("device_id", "link"), [("a100-sxm4-80gb", "pcie"), ("gh200-96gb", "c2c")])
def test_the_link_to_the_host_has_a_sourced_figure(
    device_id: str, link: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "estimate", "host_copy", "-p", "num_bytes=1G", "-d", device_id)
    source = found["sources"]["host"]
    assert source["figure"] == f"links.{link}.bytes_per_s"
    assert source["value"] == catalog.device(device_id).host_bytes_per_s
    assert source["source"]


def test_params_may_be_written_in_any_of_their_spellings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spelled = ("num_heads=32", "len-q=8192", "seq_kv=8Ki", "head_dim=128", "causal=yes")
    short = ("heads=32", "seq=8k", "dim=128", "causal=true")
    one, two = (
        document(capsys, "estimate", "Flash-Attention-2", "-d", "h100-sxm",
                 *(part for word in words for part in ("-p", word)))
        for words in (spelled, short)
    )  # fmt: skip
    assert one == two
    assert one["params"]["len_kv"] == 8192


def test_a_narrow_word_wins_over_a_wide_one(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "estimate", "attention", "-p", "seq_q=1", "-p", "seq=8k",
                     "-p", "heads=8", "-p", "dim=64", "-d", "h100-sxm")  # fmt: skip
    assert (found["params"]["len_q"], found["params"]["len_kv"]) == (1, 8192)


def test_sweep_equals_single_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("-p", "n=512", "-p", "k=512", "-p", "dtype=fp16")
    devices = ("-d", "h100-sxm", "-d", "t4")
    found = document(capsys, "sweep", "matmul", *sizes, *devices, "--over", "m=1:4096:x2")
    assert found["over"] == {"param": "m", "values": [2**i for i in range(13)]}
    assert [s["device"] for s in found["series"]] == ["h100-sxm", "t4"]
    assert found["crossovers"] == []
    chance = found["first_faster_frac"]  # an H100 against a T4: no doubt where it matters
    assert len(chance) == 13 and all(0 <= p <= 1 for p in chance) and chance[-1] > 0.95
    for series in found["series"]:
        assert "m" not in series["params"]
        for i, m in enumerate(found["over"]["values"]):
            op = Matmul(m=m, n=512, k=512, dtype="fp16")  # type: ignore[arg-type]
            e = estimate(op, on=catalog.device(series["device"]))
            assert series["seconds"][i] == e.seconds
            assert series["bound"][i] == e.bound
            assert series["bytes_by_level"]["hbm"][i] == e.bytes_by_level["hbm"]
            assert series["work"]["tensor_flops"]["fp16"][i] == e.work.tensor_flops[op.dtype]


def test_sweep_of_two_ops_finds_their_crossover(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "sweep", "mamba_scan", "flash_attention_2", "-p", "heads=32",
                     "-p", "batch=1", "-p", "dim=128", "-p", "channels=4096",
                     "--over", "seq=128:64k:x2", "--rung", "bound")  # fmt: skip
    (crossing,) = found["crossovers"]
    assert (crossing["faster"], crossing["slower"]) == ("mamba_scan", "flash_attention_2")
    values = found["over"]["values"]
    scan, flash = (s["seconds"] for s in found["series"])
    before = max(v for v in values if v <= crossing["value"])
    after = min(v for v in values if v >= crossing["value"])
    assert scan[values.index(before)] >= flash[values.index(before)]
    assert scan[values.index(after)] <= flash[values.index(after)]


def test_sweep_csv_holds_every_row_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.csv"
    found = document(capsys, "sweep", "matmul", "-p", "n=512", "-p", "k=512",
                     "--over", "m=3,700", "--csv", str(file))  # fmt: skip
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["m"]) for row in rows] == [3, 700]
    assert [float(row["seconds"]) for row in rows] == found["series"][0]["seconds"]
    assert [float(row["hbm_bytes"]) for row in rows] == found["series"][0]["bytes_by_level"]["hbm"]
    assert rows[0]["bound"] == "hbm" and rows[0]["dtype"] == "bf16"


def test_parquet_without_pyarrow_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    args = ["sweep", "matmul", *SIZES[2:], "--over", "m=1,2", "--parquet", str(tmp_path / "x")]
    assert main(args) == 2
    assert capsys.readouterr().err.startswith("ridgeplan: error: --parquet needs pyarrow")
    assert list(tmp_path.iterdir()) == []


def test_roofline_places_lie_on_or_under_their_roofs(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "m=4096 n=4096 k=4096 heads=8 seq=4k attention.dim=64 rows=4096 cols=999 batch=1 "
        "channels=2048"
    )
    params = [part for word in words.split() for part in ("-p", word)]
    ops = ("matmul", "attention", "softmax", "mamba_scan")
    found = document(capsys, "roofline", *ops, *params, "-d", "h100-sxm", "-d", "mi300x")
    for device in found["devices"]:
        bandwidth = {m["level"]: m["bytes_per_s"] for m in device["memory_roofs"]}
        top = max(c["flops_per_s"] for c in device["compute_roofs"])
        for ridge in device["ridges"]:
            peak = next(
                c["flops_per_s"] for c in device["compute_roofs"] if c["name"] == ridge["roof"]
            )
            assert np.isclose(ridge["flops_per_byte"], peak / bandwidth[ridge["level"]])
        places = [p for p in found["places"] if p["device"] == device["device"]]
        assert len(places) == 4
        for place in places:
            rate, bound = place["flops_per_s"][0], place["bound"][0]
            roofs = {
                level: x[0] * bandwidth[level]
                for level, x in place["flops_per_byte_by_level"].items()
            }
            assert rate <= min(top, *roofs.values()) * (1 + 1e-12)
            if bound in roofs:
                assert np.isclose(rate, roofs[bound])
            if bound == "tensor":
                assert np.isclose(rate, top)


def test_devices_and_clusters(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "devices")
    assert [d["id"] for d in found["devices"]] == list(catalog.device_ids())
    one = document(capsys, "devices", "h100-sxm")["device"]
    figures = {f["path"]: f for f in one["figures"]}
    assert figures["memory.hbm.bytes_per_s"]["value"] == 3.352e12
    assert all(f["source"] for f in one["figures"] if f["path"].startswith("memory.hbm"))
    assert one["doubts"]
    found = document(capsys, "clusters")
    assert [c["id"] for c in found["clusters"]] == list(catalog.cluster_ids())
    one = document(capsys, "clusters", "hgx-h100", "--nodes", "4")["cluster"]
    assert one["num_accelerators"] == 32
    assert one["levels"][-1]["size"] is None  # as wide as the cluster
    assert one["levels"][0]["bytes_per_s"] == 450e9


def test_systems(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "systems")
    assert len(found["systems"]) == 124
    for system in found["systems"]:
        assert set(system) == {"id", "title", "family", "paper", "status", "op", "claims"}
        assert system["status"] in ("proved", "derived", "not yet")
        assert (system["op"] is None) == (system["status"] == "not yet")
        counts = system["claims"]
        assert counts is None or counts["reproduced"] + counts["off"] <= counts["claims"]
    assert {"matmul", "softmax"} <= {op["id"] for op in found["ops"]}

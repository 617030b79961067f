"""`ridgeplan kernels`: shipped and own kernels, answers and every bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli import kernel_asked
from cli.main import main
from hwmodels.errors import InputError
from tests.validate.inspection.made import binary, entry, loop, source
from tests.validate.inspection.test_ranking import ENTRIES, LABELS, record
from validate.inspection import ledger
from validate.inspection.sass import Code

OWN = '''
import triton
import triton.language as tl


@triton.jit
def total(x, out, n, BLOCK: tl.constexpr):
    """Sums of exponentials, row by row."""
    row = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.exp2(tl.load(x + row * n + at, mask=at < n, other=0.0))
    tl.store(out + row, tl.sum(sums, 0))


@triton.jit
def broken(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), undefined_name)


def plain(x):
    return x
'''
TYPES = ("--signature", "x=*fp32,out=*fp32,n=i32:16", "--constants", "BLOCK=1024")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of two kernels in place of the committed one."""
    path = tmp_path / "inspection.json"
    copy = entry("copy", "copy[fp32]:BLOCK1024-w4-s1", 80, binary(spill_load_bytes=4))
    lost = binary(
        loop(wait=True, SYNCS=1), sources=(source(),), tensor_columns=256, num_warps=8,
        code=Code(counts={"BRX": 1}, loops=None, why_unknown="an indirect branch (BRX)"),
    )  # fmt: skip
    ledger.write([*ENTRIES, copy, entry("copy", "copy[fp16]:w8", 100, lost)], path)
    monkeypatch.setattr(ledger.read, "__defaults__", (path,))


def document(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main(["kernels", *args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    assert next(iter(found)) == "version"
    return found


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["kernels", *args]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["kernels", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ridgeplan: error: ")
    return err


@pytest.mark.usefixtures("recorded")
def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "list")["kernels"]
    assert [x["kernel"] for x in found] == ["copy", "gemm"]
    assert found[0]["binaries"] == {"sm_80": 1, "sm_100": 1} and found[0]["spilling"] == 1
    assert "6 binaries, compiled ahead of time by triton 3.7.1" in told(capsys, "list")


@pytest.mark.usefixtures("recorded")
def test_inspect_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "inspect", "gemm")["binaries"]
    assert [x["name"] for x in found] == sorted(e.name for e in ENTRIES)
    assert all(x["occupancy"]["blocks_per_sm"] >= 1 and x["arch"] == "sm_90" for x in found)
    assert "blocks on one SM at a time" in told(capsys, "inspect", "gemm")
    one = told(capsys, "inspect", "gemm", "--config", LABELS[2])
    assert "HMMA.16816" in one and "loop 1" in one and "outside loops" in one
    lost = told(capsys, "inspect", "copy", "--arch", "10.0")
    assert "loops: unknown, an indirect branch (BRX)" in lost and "256 of 512 columns" in lost


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("inspect", "gem"), "did you mean gemm?"),
        (("inspect", "gemm", "--arch", "sm_75"), "kernels are compiled for sm_80, sm_90, sm_100"),
        (("inspect", "gemm", "--arch", "hopper"), "is no architecture"),
        (("inspect", "gemm", "--arch", "sm_80"), "ships no configuration for sm_80"),
        (("inspect", "gemm", "--config", "w99"), "'w99' in its name"),
        (("inspect", "gemm", "--signature", "x=i32"), "does not go with a shipped kernel"),
        (("inspect", "a.py:f", "--fresh"), "does not go with your own kernel"),
        (("inspect", "a.py", *TYPES), "names no function"),
        (("inspect", "a.py:f", "--warps", "3"), "no power of two"),
        (("inspect", "a.py:f", "--stages", "0"), "between 1 and 16"),
        (("inspect", "a.py:f", "--signature", "x"), "is not NAME=VALUE"),
        (("estimate", "a.py:f", "-d", "h100-sxm", "--grid", "0"), "at least 1"),
        (("estimate", "a.py:f", "-d", "h100-sxm", "--grid", "1.5"), "whole number"),
        (("estimate", "a.py:f", "-d", "nowhere", "--grid", "1"), "unknown device"),
        (("estimate", "a.py:f", "-d", "v100-sxm2-16gb", "--grid", "1"), "sm_80, sm_90 and sm_100"),
        (("estimate", "a.py:f", "-d", "h100-sxm", "--grid", "1", "--bytes", "x=1"), "no pointer"),
    ],
)
def test_bad_questions(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str
) -> None:
    assert words in refused(capsys, *args)


@pytest.mark.parametrize(
    ("function", "types", "words"),
    [
        ("nothing", TYPES, "it defines total, broken, plain"),
        ("plain", TYPES, "is no Triton kernel"),
        (
            "broken",
            ("--signature", "x=*fp32", "--constants", "BLOCK=64"),
            "line 2 of the kernel: undefined_name is not defined",
        ),
        ("total", ("--signature", "x=*fp32", "--constants", "BLOCK=64"), "lacks out, n"),
        ("total", (*TYPES[:2], "--constants", "SIZE=64"), "unknown argument 'SIZE'"),
        (
            "total",
            ("--signature", "x=*fp33,out=*fp32,n=i32", "--constants", "BLOCK=64"),
            "is no type",
        ),
    ],
)
def test_bad_kernels(
    capsys: pytest.CaptureFixture[str], own: Path, function: str, types: tuple[str, ...], words: str
) -> None:
    assert words in refused(capsys, "inspect", f"{own}:{function}", *types)


def test_own_kernel_inspected_and_estimated(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    name = f"{own}:total"
    found = document(capsys, "inspect", name, *TYPES, "--arch", "sm_80")
    assert found["spill_bytes"] == 0 and found["counts"]["MUFU.EX2"] >= 8
    assert [x["load_bytes"] for x in found["source"] if "load_bytes" in x] == [4096]
    assert found["source"][1]["line"] == 11
    asked = ("estimate", name, "-d", "a100-sxm4-80gb", "--grid", "4k", *TYPES)
    assert "trip counts are unknown: the kernel has 1 loop (line 11)" in refused(capsys, *asked)
    time = document(capsys, *asked, "--trip", "64", "--bytes", "x=1GiB,out=16KiB")
    low, high = time["interval_s"]
    assert low <= time["seconds"] <= high and time["rung"] == "bound"
    # 2^28 exponentials at 16 a clock of 108 SMs (and ptxas' copies for the remainder of an
    # unrolled loop, once a block), and 1 GiB at 2.04 TB/s
    assert time["resources_s"]["special"] == pytest.approx(2**28 / 16 / 108 / 1.41e9, rel=0.06)
    assert time["resources_s"]["hbm"] == pytest.approx(2**30 / 2.039e12, rel=0.01)


def test_without_triton_one_line(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hidden" / "triton"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden')\n")
    monkeypatch.setenv("PYTHONPATH", str(hidden.parent))
    assert "needs triton" in refused(capsys, "inspect", f"{own}:total", *TYPES)


@pytest.mark.usefixtures("recorded")
def test_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "records.jsonl"
    tried = dict(zip(LABELS, (1.0, 2.0, 3.0, 4.0), strict=True))
    path.write_text(record(tried).line() + "\n")
    (row,) = document(capsys, "rank", str(path), "-d", "h200-sxm")["kernels"]
    assert (row["cases"], row["median_rho"], row["near_frac"]) == (1, 1.0, 1.0)
    assert "100 %" in told(capsys, "rank", str(path), "-d", "h200-sxm")


def test_signatures_constants_and_sizes() -> None:
    own = kernel_asked.own_kernel(
        "k.py:f", "a=tensordesc<bf16[64, 64]>,n=i32", "B=1_024,E=true,F=0.5,A='silu'", 4, 3
    )
    assert own.signature["a"] == "tensordesc<bf16[64, 64]>"
    assert own.constants == {"B": 1024, "E": True, "F": 0.5, "A": "silu"}
    assert kernel_asked.sizes("a=1KiB,b=1kB") == 2024 and kernel_asked.sizes("") is None
    assert kernel_asked.trips(["4", "2,3"]) == [4, 2, 3]
    with pytest.raises(InputError, match="twice"):
        kernel_asked.pairs("a=1,a=2", "--constants")

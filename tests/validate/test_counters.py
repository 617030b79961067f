"""Counters: ncu's table read, its refusals said, its bytes laid beside the counts."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import pytest

from cli.main import main as ridgeplan
from hwmodels.errors import InputError
from validate import counters
from validate.counters import (
    DENIED,
    FILE,
    METRICS,
    NO_NCU,
    Counted,
    Denied,
    Uncounted,
    chosen,
    collect,
    count,
    held,
    parse,
    read_counters,
    value_of,
)
from validate.record import Case, RecordWriter, Trial

HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
GPU = "NVIDIA H200"
TRIAD = Trial(
    kernel="triad",
    implementation="triton",
    case=Case(op="triad", dtype="fp32", params={"elements": 3 * 2**27}),
)
TRIAD_BYTES = 3 * 4 * 3 * 2**27


def cell(metric: str, unit: str, value: str, number: int = 0, kernel: str = "triad") -> str:
    return (
        f'"{number}","41","python3.12","127.0.0.1","{kernel}","1","7","(128, 1, 1)",'
        f'"(98304, 1, 1)","0","9.0","Command line profiler metrics","{metric}","{unit}","{value}"'
    )


def table(*lines: str) -> str:
    around = ("==PROF== Connected to process 41 (/usr/bin/python3.12)", "words of the program")
    return "\n".join([*around, HEAD, *lines, "==PROF== Disconnected from process 41"])


def counted(hbm_bytes: float, trial: Trial = TRIAD) -> Counted:
    half = hbm_bytes / 2
    metrics = dict.fromkeys(METRICS, None) | {
        "dram__bytes_read.sum": half,
        "dram__bytes_write.sum": half,
    }
    return Counted(
        trial=trial, gpu=GPU, launch="", kernels=("triad",), metrics=metrics, measured_at="now"
    )


def test_the_table_is_read_whatever_stands_around_it() -> None:
    kernels, found = parse(table(
        cell("dram__bytes_read.sum", "Gbyte", "3.22"),
        cell("dram__bytes_write.sum", "byte", "1,610,612,736"),
        cell("smsp__sass_data_bytes_mem_shared.sum", "byte", "n/a"),
        cell("sm__throughput.avg.pct_of_peak_sustained_elapsed", "%", "37.50"),
    ))  # fmt: skip
    assert kernels == ("triad",)
    assert found == {
        "dram__bytes_read.sum": 3.22e9,
        "dram__bytes_write.sum": 1610612736.0,
        "smsp__sass_data_bytes_mem_shared.sum": None,
        "sm__throughput.avg.pct_of_peak_sustained_elapsed": 0.375,
    }


def test_several_kernels_add_their_bytes_and_keep_the_largest_share() -> None:
    busy = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
    kernels, found = parse(table(
        cell("lts__t_bytes.sum", "Mbyte", "10.5", 0, "part"),
        cell(busy, "%", "80", 0, "part"),
        cell("lts__t_bytes.sum", "Kbyte", "500", 1, "sum, of parts"),
        cell(busy, "%", "20", 1, "sum, of parts"),
    ))  # fmt: skip
    assert kernels == ("part", "sum, of parts")
    assert found == {"lts__t_bytes.sum": 11e6, busy: 0.8}


@pytest.mark.parametrize(("first", "second"), [("n/a", "5"), ("5", "n/a")])
def test_a_sum_with_a_hole_is_unknown(first: str, second: str) -> None:
    lines = (cell("lts__t_bytes.sum", "byte", v, i) for i, v in enumerate((first, second)))
    assert parse(table(*lines))[1] == {"lts__t_bytes.sum": None}


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("12", "byte", 12.0), ("1.5", "Kbyte", 1.5e3), ("1.5", "Mbyte", 1.5e6),
        ("2", "Gbyte", 2e9), ("2", "Tbyte", 2e12), ("1,024", "inst", 1024.0), ("nan", "%", None),
        ("(!) n/a", "byte", None), ("", "byte", None), ("0", "byte", 0.0),
    ],
)  # fmt: skip
def test_units(text: str, unit: str, value: float | None) -> None:
    assert value_of(text, unit) == value


def test_an_unknown_unit_or_number_is_refused() -> None:
    with pytest.raises(InputError, match="furlong"):
        value_of("1", "furlong")
    with pytest.raises(InputError, match="many"):
        value_of("many", "byte")


def test_ncu_s_own_errors_are_one_line() -> None:
    said = (
        f"==ERROR== {DENIED} - The user does not have permission to access NVIDIA GPU Performance "
        "Counters on the target device 0."
    )
    with pytest.raises(Denied, match="run as root"):
        parse(f"==PROF== Connected\n{said}\n")
    with pytest.raises(InputError, match="No kernels were profiled"):
        parse("==PROF== Connected\n==WARNING== No kernels were profiled.\n")
    with pytest.raises(InputError, match="by hand"):
        parse("")


def fake_ncu(folder: Path, body: str, code: int = 0) -> str:
    """A program in ncu's place that writes `body` where --log-file says."""
    script = folder / "ncu"
    (folder / "body").write_text(body)
    script.write_text(
        f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\ncp "{folder}/body" "$2"\n'
        f"exit {code}\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def test_a_launch_is_counted_through_ncu(tmp_path: Path) -> None:
    body = table(cell("dram__bytes_read.sum", "Gbyte", "3.2"),
                 cell("dram__bytes_write.sum", "Gbyte", "1.6"))  # fmt: skip
    found = count(TRIAD, "BLOCK1024-w4-s2", GPU, fake_ncu(tmp_path, body))
    assert found.bytes_of("hbm") == pytest.approx(4.8e9) and math.isnan(found.bytes_of("l2"))
    with pytest.raises(Denied):
        count(TRIAD, "", GPU, fake_ncu(tmp_path, f"==ERROR== {DENIED}\n", code=1))


def test_the_file_holds_every_result_and_its_torn_line_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = table(cell("dram__bytes_read.sum", "Gbyte", "1"))
    monkeypatch.setattr(counters, "found_ncu", lambda: fake_ncu(tmp_path, body))
    found, missing = collect(tmp_path / "out", GPU, 90, kernels=("copy", "triad"))
    assert [c.trial.kernel for c in found] == ["copy", "triad"] and not missing
    assert found[1].trial == TRIAD  # the largest of the grid
    with (tmp_path / "out" / FILE).open("ab") as file:
        file.write(b'{"version": 1, "kind": "coun')
    assert read_counters(tmp_path / "out")[0] == tuple(found)


def test_without_permission_nothing_more_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = fake_ncu(tmp_path, f"==ERROR== {DENIED}", code=1)
    monkeypatch.setattr(counters, "found_ncu", lambda: script)
    found, missing = collect(tmp_path / "out", GPU, 90)
    assert not found and len(missing) == 1 and DENIED in missing[0].reason
    assert missing[0].trial is None and read_counters(tmp_path / "out") == ((), tuple(missing))


def test_without_ncu_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "found_ncu", lambda: None)
    found, missing = collect(tmp_path / "out", GPU, 90)
    assert not found and [entry.reason for entry in missing] == [NO_NCU]
    assert counters.main(["--out", str(tmp_path)]) == 0


def test_recorded_tile_sets_are_those_that_are_counted(tmp_path: Path) -> None:
    from tests.validate.made_records import records_of, written

    small = Trial(kernel="triad", implementation="triton",
                  case=Case(op="triad", dtype="fp32", params={"elements": 2**24}))  # fmt: skip
    (record,) = records_of([small])
    written(tmp_path, [record])
    assert chosen(tmp_path, GPU, 90, ("triad",)) == [(small, record.launch)]
    assert chosen(tmp_path / "none", GPU, 90, ("triad",)) == [(TRIAD, "")]


def test_counts_beside_counters() -> None:
    exact, more = counted(TRIAD_BYTES), counted(1.2 * TRIAD_BYTES)
    small = Trial(kernel="triad", implementation="triton",
                  case=Case(op="triad", dtype="fp32", params={"elements": 2**20}))  # fmt: skip
    stray = counted(1.0, Trial(kernel="nothing", implementation="triton", case=TRIAD.case))
    found, reasons = held([exact, more, counted(12.0 * 2**20, small), stray])
    assert [h.kept for h in found] == [True, False, True]
    assert [h.judged for h in found] == [True, True, False]
    assert found[0].ratio("hbm") == pytest.approx(1.0)
    assert found[1].ratio("hbm") == pytest.approx(1 / 1.2) and math.isnan(found[0].ratio("l2"))
    assert len(reasons) == 1 and "no kernel nothing" in next(iter(reasons))


def test_the_command_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RecordWriter(tmp_path / FILE) as writer:
        writer.append(counted(1.2 * TRIAD_BYTES))
        writer.append(Uncounted(trial=None, reason="because", measured_at="now"))
    assert ridgeplan(["validate", "--counters", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "triad" in out and "0.833" in out and "1 of 1" in out and "because" in out
    assert ridgeplan(["validate", "--counters", str(tmp_path), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["counters"]
    assert entry["judged"] and not entry["kept"]


def test_without_counters_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ridgeplan(["validate", "--counters", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "ncu" in out and len(out.strip().splitlines()) == 1 and not err
    assert ridgeplan(["validate"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_counted_run_launches_once_between_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tests.validate.cpu_gpu import CpuGpu
    from validate import counted_run

    said: list[str] = []

    class Gpu(CpuGpu):
        def outputs(self, run: object) -> object:
            said.append("launch")
            return run()  # type: ignore[operator]

        def close(self) -> None:
            said.append("close")

    monkeypatch.setattr("validate.torch_gpu.open_gpu", lambda: Gpu(90))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: said.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: said.append("stop"))
    small = Trial(kernel="triad", implementation="triton",
                  case=Case(op="triad", dtype="fp32", params={"elements": 1000}))  # fmt: skip
    counted_run.run(small, "no such tile set")
    assert said == ["launch", "launch", "start", "launch", "stop", "close"]
    with pytest.raises(InputError, match="nothing"):
        counted_run.run(Trial(kernel="nothing", implementation="triton", case=small.case), "")

"""The bars of a GPU: each judged both ways on made-up records, and one line without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from tests.validate.made_records import GPU, grid, records_of, written
from validate.counters import FILE, HBM, Counted, Uncounted
from validate.gpu_bars import (
    FULL,
    KEPT,
    MISSED,
    QUICK,
    STREAM_FRAC,
    UNMEASURED,
    Profiled,
    Result,
    calibrated,
    correctness,
    counted,
    judge,
    main,
    rivals,
    streams,
    table,
    triad,
)
from validate.record import Record, RecordWriter, Refused

KERNELS = ("copy", "triad", "gemm", "rmsnorm")


@lru_cache(maxsize=1)
def made() -> tuple[Record, ...]:
    """All of four kernels, without noise."""
    return tuple(records_of(grid(KERNELS), noise=0.001))


def profiled(records: tuple[Record, ...], *refused: Refused) -> Profiled:
    return Profiled(records, refused)


def slower(kernel: str, factor: float, ours: bool = True) -> tuple[Record, ...]:
    """The same records with one kernel's times changed, ours or the others'."""
    return tuple(
        replace(r, seconds=r.seconds * factor)
        if r.kernel == kernel and r.implementation.startswith("triton") == ours
        else r
        for r in made()
    )


def refusal(kind: str) -> Refused:
    trial = next(r.trial for r in made() if r.implementation == "triton")
    return Refused(trial=trial, gpu=GPU, kind=kind, reason="it said so", measured_at="now")


def test_a_wrong_kernel_is_a_bar_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("validate.gpu_bars._own_kernels", lambda: list(KERNELS))
    (fine,) = correctness(profiled(made()))
    assert fine.state == KEPT and fine.value == 1.0
    for kind in ("wrong", "lost", "compile"):
        (off,) = correctness(profiled(made(), refusal(kind)))
        assert off.state == MISSED and kind in off.note
    (fit,) = correctness(profiled(made(), refusal("memory")))
    assert fit.state == KEPT  # no fault of the kernel's
    monkeypatch.setattr("validate.gpu_bars._own_kernels", lambda: [*KERNELS, "more"])
    (gap,) = correctness(profiled(made()))
    assert gap.state == UNMEASURED and "more" in gap.note


def test_triad_against_the_best_copy() -> None:
    assert triad(profiled(made())).state == KEPT
    slow = triad(profiled(slower("triad", 2.0)))
    assert slow.state == MISSED and slow.value is not None and slow.value < 0.6
    assert triad(profiled(())).state == UNMEASURED


def test_rivals_are_compared_shape_by_shape() -> None:
    large = profiled(slower("gemm", 1.3))
    pairs = rivals(large, "gemm", lambda r: r.case.params["m"] >= 4096)
    assert pairs and all(value == pytest.approx(1 / 1.3, rel=0.01) for _, value in pairs)
    assert not rivals(large, "flash_attention", lambda r: True)


def test_streams_against_triad() -> None:
    by_bar = {r.bar: r for r in streams(profiled(made()))}
    fair = by_bar["rmsnorm"].value
    assert fair is not None
    bars = {factor: streams(profiled(slower("rmsnorm", factor)))[0] for factor in (0.2, 5.0)}
    assert bars[0.2].state == KEPT and bars[5.0].state == MISSED
    assert bars[5.0].value == pytest.approx(fair / 5) and fair / 5 < STREAM_FRAC
    (nothing,) = streams(profiled(()))
    assert nothing.state == UNMEASURED


def split(records: tuple[Record, ...]) -> tuple[Profiled, Profiled]:
    quick = tuple(r for r in records if sum(map(ord, r.case.key)) % 3 == 0)
    return profiled(quick), profiled(records)


def test_calibrated_on_quick_and_judged_on_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = tuple(records_of(grid(("gemm",)), noise=0.03))
    quick, full = split(noisy)
    found = {r.bar: r for r in calibrated(quick, full)}
    assert found["calibrated: gemm"].state == KEPT, found
    assert found["covered"].value is not None and found["covered"].value > 0.8
    moved = profiled(tuple(replace(r, seconds=r.seconds * 1.5) for r in noisy))
    off = {r.bar: r for r in calibrated(quick, moved)}
    assert off["calibrated: gemm"].state == MISSED and off["covered"].state == MISSED
    (same,) = calibrated(quick, quick)
    assert same.state == UNMEASURED and "had not seen" in same.note
    (none,) = calibrated(profiled(()), full)
    assert none.state == UNMEASURED


def test_counters_are_held_to_five_percent(tmp_path: Path) -> None:
    largest = max(
        (r for r in made() if r.kernel == "triad" and r.implementation == "triton"),
        key=lambda r: r.case.params["elements"],
    )
    moved = 12.0 * largest.case.params["elements"]
    assert counted(tmp_path)[0].state == UNMEASURED
    for times, state in ((1.02, KEPT), (1.2, MISSED)):
        entry = Counted(
            trial=largest.trial, gpu=GPU, launch="", kernels=("k",), measured_at="now",
            metrics={HBM[0]: moved * times, HBM[1]: 0.0},
        )  # fmt: skip
        with RecordWriter(tmp_path / FILE) as writer:
            writer.append(entry)
        (found,) = counted(tmp_path)
        assert found.state == state and found.bar == "counted: triad"
    other = tmp_path / "other"
    other.mkdir()
    with RecordWriter(other / FILE) as writer:
        writer.append(Uncounted(trial=None, reason="no ncu", measured_at="now"))
    assert counted(other)[0].note == "no ncu"


def test_the_command_judges_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tuple(r for r in made() if r.kernel in ("copy", "triad"))
    written(tmp_path / QUICK, list(few[::2]))
    written(tmp_path / FULL, list(few))
    assert main(["--judge", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "measured" in out.splitlines()[0] and "unmeasured" in out.splitlines()[-1]
    saved = json.loads((tmp_path / "bars.json").read_text())
    assert {b["bar"] for b in saved["bars"]} >= {"correct", "triad", "gemm", "counted"}
    assert main(["--judge", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == saved
    assert [r.bar for r in judge(tmp_path)] == [b["bar"] for b in saved["bars"]]


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--judge", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    stray = replace(made()[0].environment, gpu="NVIDIA Z9")
    written(tmp_path / FULL, [made()[0], replace(made()[0], environment=stray)])
    assert main(["--judge", str(tmp_path)]) == 2
    assert "several GPUs" in capsys.readouterr().err


def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["--out", str(tmp_path / "new")]) == 2
    out, err = capsys.readouterr()
    assert not out and "CUDA" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_the_table_counts_what_was_kept() -> None:
    one = Result(bar="a", asked="b", measured="1", value=1.0, state=KEPT)
    lines = table([one, replace(one, state=UNMEASURED)]).splitlines()
    assert len(lines) == 4 and lines[-1] == "1 kept, 0 missed, 1 unmeasured"

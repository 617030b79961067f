"""Totals are exact sums of tables, and the Markdown says what it must."""

from __future__ import annotations

import datetime

import pytest

from tests.validate.data import (
    example,
    made_calibration,
    timed_as_predicted,
    timed_at_the_bound,
)
from validate.compare import OWN_ROW, ablate, compare
from validate.measurement import Measurement
from validate.report import accuracy_markdown, constants_text, reason_counts, totals

TODAY = datetime.date(2026, 11, 21)
STEP = example("ttft_ms", params={"parallelism": {}})
H100 = made_calibration("h100-sxm")


def product(factor: float, **changes: object) -> Measurement:
    row = example("gemm", family="gemm", **changes)
    return timed_as_predicted(row, factor, [H100])


def test_totals_equal_the_errors_of_all_rows_at_once() -> None:
    fast = [timed_as_predicted(example("softmax"), 1.25)]
    slow = [timed_as_predicted(example("gemm"), f) for f in (2.0, 4.0, 0.5)]
    (total,) = totals(compare([*fast, *slow, STEP]).tables)
    assert (total.family, total.gpu, total.n, total.unsupported) == ("f", "H100-SXM-80GB", 4, 1)
    assert total.mape == pytest.approx((0.2 + 0.5 + 0.75 + 1.0) / 4)
    assert total.bias == pytest.approx((0.8 * 0.5 * 0.25 * 2) ** (1 / 4) - 1)


def test_rows_faster_than_the_bound_add_up() -> None:
    rows = [timed_at_the_bound(example(op), 0.5) for op in ("softmax", "gemm")]
    (total,) = totals(compare(rows).tables)
    assert total.faster_cold + total.faster_warm == 2


def test_a_family_without_predictions_has_no_error() -> None:
    (total,) = totals(compare([STEP] * 2).tables)
    assert (total.n, total.unsupported, total.mape, total.bias) == (0, 2, None, None)


def test_the_record_is_dated_and_has_a_row_a_cell() -> None:
    rows = [product(1.25), product(1.25, dtype="fp16"), STEP]
    text = accuracy_markdown(
        compare(rows, calibrations=[H100]), on=TODAY, data="test",
        command="ridgeplan validate test",
    )  # fmt: skip
    assert "2026-11-21, rung **best**" in text
    assert "3 rows, 2 predicted, 1 without a prediction" in text
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| gemm | ")]
    assert [c[2:5] for c in cells] == [["bf16", "1", "0"], ["fp16", "1", "0"]]
    assert [c[6] for c in cells] == ["20.0", "20.0"]
    assert [c[7] for c in cells] == ["3.7", "?"], "the noise floor, and where it is not known"
    assert [c[10] for c in cells] == ["-20.0", "-20.0"]
    assert all(c[13] == "own |" for c in cells)
    assert "| f | a whole step is not one op | 1 |" in text
    assert text.endswith("Written by `ridgeplan validate test`.\n")


def test_every_error_stands_beside_its_noise_and_its_roofline() -> None:
    text = accuracy_markdown(compare([product(1.25)], calibrations=[H100]), on=TODAY, data="x")
    tables = [line for line in text.splitlines() if line.startswith("|") and "MAPE %" in line]
    assert len(tables) == 2
    assert all("noise %" in line for line in tables)
    assert "roofline %" in tables[1]


def test_the_record_says_which_bars_were_missed() -> None:
    def bar(factor: float) -> str:
        comparison = compare([product(factor)] * 3, calibrations=[H100])
        text = accuracy_markdown(comparison, on=TODAY, data="x")
        (line,) = (s for s in text.splitlines() if s.startswith("| GEMM bf16 |"))
        return line

    assert bar(1.25) == (
        "| GEMM bf16 | H100-SXM-80GB | fitted | 3 | 20.0 | 6.5 | 3.7 | -20.0 | - | 0.0 | 0.0 "
        "| MAPE, bias |"
    )
    assert bar(1.0).endswith("| 100.0 | 100.0 |  |")


def test_rows_fitted_on_are_reported_as_such() -> None:
    row = product(1.0)
    comparison = compare([row], calibrations=[made_calibration("h100-sxm", rows=[row])])
    assert f"| gemm | {OWN_ROW} | 1 |" in accuracy_markdown(comparison, on=TODAY, data="x")


def test_the_record_shows_the_steps_of_calibration_when_asked() -> None:
    rows = [product(1.0)]
    comparison = compare(rows, calibrations=[H100])
    assert "What calibration buys" not in accuracy_markdown(comparison, on=TODAY, data="x")
    text = accuracy_markdown(comparison, on=TODAY, data="x", ablation=ablate(rows, [H100]))
    (line,) = (s for s in text.splitlines() if s.startswith("| gemm | H100-SXM-80GB | 1 | ")
               and s.count("|") == 8)  # fmt: skip
    assert line.endswith(" | 0.0 |")


def test_rows_faster_than_the_bound_have_a_table_only_where_there_are_any() -> None:
    slow, fast = (compare([timed_at_the_bound(example("gemm"), f)]) for f in (2.0, 0.5))
    assert "Faster than" not in accuracy_markdown(slow, on=TODAY, data="x")
    assert "| f | H100-SXM-80GB | 1 | 0 |" in accuracy_markdown(fast, on=TODAY, data="x")


def test_a_hostile_name_cannot_break_a_table() -> None:
    row = example("gemm", family="a|b\n<script>", seconds=1.0)
    text = accuracy_markdown(compare([row]), on=TODAY, data="x")
    assert "| a/b &lt;script> | H100-SXM-80GB | bf16 | 1 | 0 |" in text
    assert "<script>" not in text


def test_constants_are_named_by_their_donors() -> None:
    donors = [made_calibration(d) for d in ("h100-sxm", "a100-sxm4-80gb", "v100-sxm2-16gb", "t4")]

    def text(device_id: str, count: int) -> str:
        row = example("gemm", device_id=device_id)
        return constants_text(compare([row], calibrations=donors[:count]).points)

    assert text("h100-sxm", 2) == "own"
    assert text("h200-sxm", 2) == "architecture (h100-sxm)"
    assert text("b200-sxm", 2) == "mean (a100-sxm4-80gb, h100-sxm)"
    assert text("b200-sxm", 4) == "mean (4 devices)"
    assert text("b200-sxm", 0) == "nominal"


def test_reasons_are_ordered_by_how_often_they_hold() -> None:
    rare = example("gemm", seconds=None)
    assert reason_counts(compare([rare, *[STEP] * 3])) == [
        ("f", "a whole step is not one op", 3),
        ("f", "the metric is not a time", 1),
    ]


def test_without_refused_rows_there_is_no_table_of_reasons() -> None:
    text = accuracy_markdown(compare([example("gemm")]), on=TODAY, data="x")
    assert "Rows without" not in text

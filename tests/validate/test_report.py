"""Totals are exact sums of tables, and the Markdown says what it must."""

from __future__ import annotations

import datetime

import pytest

from tests.validate.data import example, timed_at_the_bound
from validate.compare import compare
from validate.report import accuracy_markdown, reason_counts, totals


def test_totals_equal_the_errors_of_all_rows_at_once() -> None:
    fast = [timed_at_the_bound(example("softmax"), 1.25)]
    slow = [timed_at_the_bound(example("gemm"), f) for f in (2.0, 4.0, 0.5)]
    (total,) = totals(compare([*fast, *slow, example("rnn_fwd")]).tables)
    assert (total.family, total.gpu, total.n, total.unsupported) == ("f", "H100-SXM-80GB", 4, 1)
    assert total.mape == pytest.approx((0.2 + 0.5 + 0.75 + 1.0) / 4)
    assert total.bias == pytest.approx((0.8 * 0.5 * 0.25 * 2) ** (1 / 4) - 1)
    assert total.faster_cold + total.faster_warm == 1


def test_a_family_without_predictions_has_no_error() -> None:
    (total,) = totals(compare([example("rnn_fwd")] * 2).tables)
    assert (total.n, total.unsupported, total.mape, total.bias) == (0, 2, None, None)


def test_the_record_is_dated_and_says_that_a_bound_is_no_prediction() -> None:
    comparison = compare([timed_at_the_bound(example("gemm"), 2.0), example("rnn_fwd")])
    text = accuracy_markdown(
        comparison, on=datetime.date(2026, 11, 21), data="test", command="ridgeplan validate test"
    )
    assert "2026-11-21, rung **bound**" in text
    assert "2 rows, 1 predicted, 1 without a prediction" in text
    assert "lower bound" in text
    assert "4-8 %" in text
    assert "| f | H100-SXM-80GB | 1 | 1 | 50.0 | -50.0 | 0 | 0 |" in text
    assert "| f | no op for rnn_fwd yet | 1 |" in text
    assert text.endswith("Written by `ridgeplan validate test`.\n")


def test_reasons_are_ordered_by_how_often_they_hold() -> None:
    comparison = compare([example("rnn_fwd"), *[example("all_reduce")] * 3])
    assert reason_counts(comparison) == [
        ("f", "no op for all_reduce yet", 3),
        ("f", "no op for rnn_fwd yet", 1),
    ]


def test_without_refused_rows_there_is_no_table_of_reasons() -> None:
    comparison = compare([timed_at_the_bound(example("gemm"))])
    text = accuracy_markdown(comparison, on=datetime.date(2026, 11, 21), data="x")
    assert "Rows without" not in text

"""The accuracy page draws its evidence: every row in its family's panel, one colour a GPU."""

from __future__ import annotations

import datetime
import os
import re
import shutil

import numpy as np
import pytest

from cli.charts import accuracy
from cli.charts.accuracy import FARTHEST, page, parity, residuals
from tests.validate.data import example, made_calibration, timed_as_predicted
from validate.compare import Comparison, compare
from validate.measurement import Measurement

CHROME = shutil.which("chromium") or shutil.which("google-chrome") or os.environ.get("BROWSER_PATH")
GPUS = {"H100-SXM-80GB": "h100-sxm", "A100-SXM4-80GB": "a100-sxm4-80gb", "T4": "t4"}
H100 = made_calibration("h100-sxm")
TODAY = datetime.date(2026, 11, 21)


def rows(count: int = 40, families: tuple[str, ...] = ("gemm", "softmax")) -> list[Measurement]:
    """Rows of those families on every GPU, timed from a quarter to four times the prediction."""
    return [
        timed_as_predicted(
            example(
                "gemm", family=family, gpu=gpu, device_id=device_id, dtype="fp16",
                params={"m": 64 * (i + 1)},
            ),
            4.0 ** np.sin(i),
            [H100],
        )
        for family in families
        for gpu, device_id in GPUS.items()
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(rows(), calibrations=[H100])


def markers(fig: object) -> list[object]:
    return [t for t in fig.data if t.mode == "markers"]  # type: ignore[attr-defined]


def test_parity_draws_every_row_in_its_panel(comparison: Comparison) -> None:
    fig, points = parity(comparison.points), comparison.points
    drawn = markers(fig)
    assert len(drawn) == 2 * len(GPUS)
    for axis, family in (("x", "gemm"), ("x2", "softmax")):
        mine = points.at(points.family == family)
        x = np.concatenate([t.x for t in drawn if t.xaxis == axis])
        y = np.concatenate([t.y for t in drawn if t.xaxis == axis])
        assert sorted(x) == sorted(mine.measured_s) and sorted(y) == sorted(mine.predicted_s)
    lines = [t for t in fig.data if t.mode == "lines" and t.xaxis == "x"]
    assert [t.y[0] / t.x[0] for t in lines] == pytest.approx([1, 2, 0.5])
    assert fig.layout.xaxis.type == fig.layout.yaxis.type == fig.layout.xaxis2.type == "log"


def test_a_gpu_has_one_colour_and_one_entry_in_the_legend(comparison: Comparison) -> None:
    for fig in (parity(comparison.points), residuals(comparison.points)):
        drawn = markers(fig)
        assert len({(t.legendgroup, t.marker.color) for t in drawn}) == len(GPUS)
        assert sorted(t.legendgroup for t in drawn if t.showlegend) == sorted(GPUS)


def test_residuals_are_ratios_and_far_ones_stand_at_the_edge() -> None:
    near, far = (timed_as_predicted(example("gemm"), f, [H100]) for f in (1.25, 100.0))
    fig = residuals(compare([near, far], calibrations=[H100]).points)
    (trace,) = markers(fig)
    assert sorted(trace.y) == pytest.approx([1 / FARTHEST, 0.8])
    low, high = fig.layout.yaxis.range
    assert low < np.log10(trace.y).min() and np.log10(trace.y).max() < high


def test_many_points_are_thinned_and_the_picture_says_so(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "MOST_POINTS", 100)
    fig = parity(comparison.points)
    drawn = sum(len(t.x) for t in markers(fig))
    assert 90 <= drawn <= 110
    (note,) = (a.text for a in fig.layout.annotations if a.name == "footnote")
    assert f"{drawn} of 240 points" in note
    for gpu in GPUS:  # the ends of every group stay
        mine = comparison.points.at(comparison.points.gpu == gpu)
        assert max(max(t.x) for t in markers(fig) if t.legendgroup == gpu) == mine.measured_s.max()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 13])
def test_panels_keep_apart_inside_the_picture(count: int) -> None:
    names = tuple(f"family_{i:02}" for i in range(count))
    fig = parity(compare(rows(1, names), calibrations=[H100]).points)
    axes = [
        (fig.layout[f"xaxis{n}"].domain, fig.layout[f"yaxis{n}"].domain)
        for n in ("", *range(2, count + 1))
    ]
    assert all(0 <= a < b <= 1 for axis in axes for a, b in axis)
    for i, (x, y) in enumerate(axes):
        for other_x, other_y in axes[i + 1 :]:
            assert x[1] < other_x[0] or other_x[1] < x[0] or other_y[1] < y[0] or y[1] < other_y[0]


def test_the_page_holds_charts_tables_and_reasons(comparison: Comparison) -> None:
    text = page(comparison, data="test", on=TODAY)
    assert text.count("Plotly.newPlot(") == 2
    assert "240 rows of test: 240 predicted, 0 without a prediction. 2026-11-21." in text
    for heading in ("Mean absolute percentage error", "Coverage of the intervals",
                    "Errors by whose constants were used"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text
    assert "Rows without a prediction" not in text
    assert len(re.findall(r"<td style='background:rgb\(\d+,\d+,\d+\)'", text)) == 2 * 2 * len(GPUS)


def test_a_page_without_evidence_still_has_its_reasons() -> None:
    text = page(compare([example("gemm", seconds=None)]), data="x", on=TODAY)
    assert "the metric is not a time" in text
    assert "Plotly" not in text


def test_hostile_names_stay_text() -> None:
    bad = "</script><script>alert(1)</script>"
    text = page(
        compare([example("gemm", family=bad, gpu=bad), example(bad, seconds=None)]),
        data=bad, on=TODAY,
    )  # fmt: skip
    assert "<script>alert" not in text


@pytest.mark.slow
@pytest.mark.skipif(CHROME is None, reason="no browser to draw with")
def test_the_charts_can_be_drawn(comparison: Comparison) -> None:
    from cli.charts.picture import rendered

    for fig in (parity(comparison.points), residuals(comparison.points)):
        assert rendered(fig, ".png").startswith(b"\x89PNG")

"""A fit as one page: parity by family with intervals, residuals by regime, what was left out."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import plotly.graph_objects as go

from cli.charts.accuracy import document, drawn, parity, residuals, section
from cli.quantity import shown
from validate.fit_report import by_regime
from validate.report import percent

if TYPE_CHECKING:
    from validate.fit_report import FitReport, ModelFit

HELD_OUT: Final = "Errors are those of a new timing of each shape: wider than what the fit leaves."


def page(report: FitReport, *, data: str) -> str:
    """The whole page as HTML."""
    calibration = report.calibration
    head = (
        f"{len(calibration.rows):,} rows of {data}, {sum(report.left_out.values()):,} left out. "
        f"{HELD_OUT} {calibration.date.isoformat()}."
    )
    body = [
        f"<h1>Calibration of {html.escape(calibration.device_id)}</h1><p>{html.escape(head)}</p>",
        *drawn(figures(report)),
        section("Models", "Errors in %; constants with the doubt of each.", _models(report)),
        *_left_out(report),
    ]
    return document(f"calibration of {calibration.device_id}", body)


def _left_out(report: FitReport) -> list[str]:
    if not report.left_out:
        return [section("Left out", "No row: the fit took all of them.", "")]
    return [section("Left out", "Rows that the fit did not take.", _reasons(report.left_out))]


def figures(report: FitReport) -> tuple[go.Figure, go.Figure]:
    """Parity by family, residuals by regime."""
    return (
        parity(report.points, note=HELD_OUT, intervals=True),
        residuals(
            by_regime(report), note=HELD_OUT, title="Predicted / measured by the largest term"
        ),
    )


def _models(report: FitReport) -> str:
    heads = ("model", "rows", "MAPE", "bias", "in 90 %", "constants", "open", "at a bound")
    return _table(heads, [_cells(m) for m in report.models])


def _cells(m: ModelFit) -> tuple[str, ...]:
    learned = ", ".join(
        f"{name} {v:.4g} ±{percent(math.expm1(w))} %" for name, (v, w) in m.learned.items()
    )
    errors = (percent(m.mape), percent(m.bias), percent(m.coverage_90))
    return m.model, f"{m.n:,}", *errors, learned, ", ".join(m.open), ", ".join(m.at_bound)


def _reasons(left_out: Mapping[str, int]) -> str:
    falling = sorted(left_out.items(), key=lambda item: -item[1])
    return _table(("reason", "rows"), [(reason, f"{n:,}") for reason, n in falling])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>", *(f"<th class='text'>{h}</th>" for h in heads), "</tr>"]
    for row in rows:
        cells = (f"<td class='text'>{html.escape(shown(cell, 400))}</td>" for cell in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "".join([*lines, "</table>"])

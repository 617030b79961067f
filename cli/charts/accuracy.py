"""Predicted against measured as one page: parity, residuals, error and coverage by family and GPU.

The page is self-contained. Each family has a panel of its own, each GPU a colour; what stands in
the panels is the evidence of `validate.compare`, thinned where there are too many points to see.
"""

from __future__ import annotations

import datetime
import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import plotly.graph_objects as go

from cli.charts.picture import (
    FAINT,
    FONT,
    GRID,
    INK,
    MARGIN,
    PALETTE,
    QUIET,
    WIDTH,
    seconds_tick,
    style,
    text_width,
)
from cli.charts.plane import decades
from cli.quantity import seconds_text, shown
from validate.bars import BARS, noise_floor
from validate.compare import Comparison, errors
from validate.report import percent, reason_counts

if TYPE_CHECKING:
    from validate.compare import Points

COLORS: Final = (
    *PALETTE, "#8c510a", "#7f7f7f", "#01665e", "#a50026", "#b8a200", "#f4a6c0", "#313695",
    "#7fbc41", "#c51b7d",
)  # fmt: skip
"""One a GPU, the commonest first; where they run out, the next symbol."""
SYMBOLS: Final = ("circle", "diamond", "square", "x")
PANELS: Final = (520, 400, 300, 232)
"""Heights of a panel in pixels, by how many stand side by side."""
GAP, HEADING = 84, 38
MOST_POINTS: Final = 6000
LEAST_A_GROUP: Final = 12
FARTHEST: Final = 5.0
"""Residuals beyond this factor stand at the panel's edge."""
EVIDENCE: Final = "Rows that a calibration was fitted on are left out."
HEAT_TOP: Final = 0.5
"""The error that has the strongest colour."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One family's place in the grid, domains as fractions of the plot area."""

    number: int
    family: str
    points: Points
    x_domain: tuple[float, float]
    y_domain: tuple[float, float]

    @property
    def suffix(self) -> str:
        """What plotly puts behind the names of the panel's axes."""
        return "" if self.number == 1 else str(self.number)


def page(comparison: Comparison, *, data: str, on: datetime.date) -> str:
    """The whole page as HTML."""
    without = sum(t.unsupported for t in comparison.tables)
    num_points = len(comparison.points)
    head = (
        f"{num_points + without:,} rows of {data}: {num_points:,} predicted, "
        f"{without:,} without a prediction. {on.isoformat()}."
    )
    body = [f"<h1>Predicted against measured</h1><p>{html.escape(head)}</p>"]
    if num_points:
        body += drawn((parity(comparison.points), residuals(comparison.points)))
        body += [_heat(comparison.points), _coverage(comparison.points), _families(comparison)]
    body.append(_reasons(comparison))
    return document(f"accuracy on {data}", body)


def drawn(figures: Sequence[go.Figure]) -> list[str]:
    """Figures as parts of one page; the first brings the script."""
    return [
        figure.to_html(
            full_html=False,
            include_plotlyjs=i == 0,
            div_id=f"ridgeplan-{i + 1}",
            config={"displaylogo": False, "responsive": False},
        )
        for i, figure in enumerate(figures)
    ]


def document(title: str, body: Sequence[str]) -> str:
    """A self-contained page in the house look."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>Ridgeplan: {html.escape(title)}</title><style>{_CSS}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def parity(points: Points, *, note: str = EVIDENCE, intervals: bool = False) -> go.Figure:
    """Predicted over measured, both logarithmic, a panel a family; 90 % intervals if asked for."""
    fig, panels = go.Figure(), _panels(points)
    shown_points = _thinned(points)
    for panel in panels:
        low, high = _spread(panel.points.measured_s, panel.points.predicted_s)
        for factor, dash in ((1.0, "solid"), (2.0, "dot"), (0.5, "dot")):
            _line(fig, panel, (low, high), (low * factor, high * factor), dash)
        ticks = decades(low, high, 4)
        axis = _axis(low, high, ticks, [seconds_tick(t) for t in ticks])
        _frame(fig, panel, axis, axis, f"MAPE {percent(errors(panel.points).mape)} %")
    _markers(
        fig, panels, shown_points, lambda p: (p.measured_s, p.predicted_s), intervals=intervals
    )
    bars = " Bars: 90 % intervals." if intervals else ""
    _finish(
        fig, panels, shown_points, points, note,
        title="Predicted over measured time",
        subtitle="Across: measured, up: predicted. Solid: equal. Dotted: a factor of two apart."
        + bars,
    )  # fmt: skip
    return fig


def residuals(
    points: Points,
    *,
    note: str = EVIDENCE,
    title: str = "Predicted / measured, over measured time",
) -> go.Figure:
    """Predicted / measured over the measured time, both logarithmic, a panel a family."""
    fig, panels = go.Figure(), _panels(points)
    shown_points = _thinned(points)
    ticks = [0.25, 0.5, 1, 2, 4]
    y = _axis(1 / FARTHEST / 1.06, FARTHEST * 1.06, ticks, ["¼", "½", "1", "2", "4"])
    for panel in panels:
        low, high = _spread(panel.points.measured_s)
        for ratio, dash in ((1.0, "solid"), (2.0, "dot"), (0.5, "dot")):
            _line(fig, panel, (low, high), (ratio, ratio), dash)
        x_ticks = decades(low, high, 4)
        x = _axis(low, high, x_ticks, [seconds_tick(t) for t in x_ticks])
        bias = errors(panel.points).bias or 0.0
        _frame(fig, panel, x, y, f"bias {100 * bias:+.1f} %")

    def place(p: Points) -> tuple[np.ndarray, np.ndarray]:
        return p.measured_s, np.clip(p.predicted_s / p.measured_s, 1 / FARTHEST, FARTHEST)

    _markers(fig, panels, shown_points, place)
    _finish(
        fig, panels, shown_points, points, note,
        title=title,
        subtitle="Across: measured time, up: the ratio. Dotted: a factor of two. Points beyond a "
        f"factor of {FARTHEST:.0f} stand at the edge.",
    )  # fmt: skip
    return fig


# ---- the grid of panels --------------------------------------------------------------------


def _panels(points: Points) -> list[_Panel]:
    """A grid of equal panels, families in order of their names."""
    families = points.groups("family")
    columns, panel, high = _shape(len(families))
    across, gap = 1 / columns, 0.035
    found = []
    for i, ((family,), members) in enumerate(families.items()):
        row, column = divmod(i, columns)
        top = 1 - (HEADING + row * (panel + GAP)) / high
        left = column * (across + gap / columns)
        domain = (left, min(left + across - gap, 1.0))
        found.append(_Panel(i + 1, family, members, domain, (max(top - panel / high, 0), top)))
    return found


def _shape(num_panels: int) -> tuple[int, int, int]:
    """Panels side by side, the height of one, and the height of all, in pixels."""
    columns = min(num_panels, len(PANELS))
    panel, rows = PANELS[columns - 1], -(-num_panels // columns)
    return columns, panel, rows * (panel + GAP) - GAP + HEADING


def _thinned(points: Points) -> Points:
    """At most about `MOST_POINTS`, evenly over the measured times of each family on each GPU."""
    if len(points) <= MOST_POINTS:
        return points
    share = MOST_POINTS / len(points)
    labels = np.array([f"{f}\n{g}" for f, g in zip(points.family, points.gpu, strict=True)])
    kept = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(points.measured_s[mine], kind="stable")]
        number = min(len(mine), max(round(share * len(mine)), LEAST_A_GROUP))
        kept.append(mine[np.linspace(0, len(mine) - 1, number).round().astype(int)])
    return points.at(np.sort(np.concatenate(kept)))


def _colors(points: Points) -> dict[str, tuple[str, str]]:
    """Colour and symbol of each GPU, the commonest first."""
    names, counts = np.unique(points.gpu.astype(str), return_counts=True)
    order = sorted(zip(-counts, names, strict=True))
    return {
        name: (COLORS[i % len(COLORS)], SYMBOLS[i // len(COLORS) % len(SYMBOLS)])
        for i, (_, name) in enumerate(order)
    }


def _markers(
    fig: go.Figure,
    panels: Sequence[_Panel],
    points: Points,
    place: Callable[[Points], tuple[np.ndarray, np.ndarray]],
    *,
    intervals: bool = False,
) -> None:
    """The points, a trace for every family and GPU; GPUs switch on and off together."""
    colors = _colors(points)
    named: set[str] = set()
    for panel in panels:
        for (gpu,), mine in points.at(points.family == panel.family).groups("gpu").items():
            color, symbol = colors[gpu]
            x, y = place(mine)
            fig.add_trace(
                go.Scatter(
                    x=x, y=y, mode="markers", name=html.escape(shown(gpu, 24)), legendgroup=gpu,
                    legendrank=list(colors).index(gpu), showlegend=gpu not in named,
                    xaxis=f"x{panel.suffix}", yaxis=f"y{panel.suffix}",
                    marker={"color": color, "symbol": symbol, "size": 4, "opacity": 0.6},
                    hovertext=_hovers(mine), hoverinfo="text",
                    error_y=_bars(mine, color) if intervals else None,
                )
            )  # fmt: skip
            named.add(gpu)


def _bars(points: Points, color: str) -> dict[str, object]:
    """The 90 % interval of each prediction."""
    return {
        "type": "data", "symmetric": False, "array": points.high_90_s - points.predicted_s,
        "arrayminus": points.predicted_s - points.low_90_s, "color": color, "thickness": 0.7,
        "width": 0,
    }  # fmt: skip


def _hovers(points: Points) -> list[str]:
    """What each point is."""
    return [
        f"<b>{html.escape(shown(op))}</b> {html.escape(shown(dtype))} on {html.escape(shown(gpu))}"
        f"<br>measured {seconds_text(measured)}, predicted {seconds_text(predicted)}<br>80 %: "
        f"{seconds_text(low)} to {seconds_text(high)}"
        for op, dtype, gpu, measured, predicted, low, high in zip(
            points.op, points.dtype, points.gpu, points.measured_s, points.predicted_s,
            points.low_80_s, points.high_80_s, strict=True,
        )
    ]  # fmt: skip


def _line(
    fig: go.Figure, panel: _Panel, x: tuple[float, float], y: tuple[float, float], dash: str
) -> None:
    fig.add_trace(
        go.Scatter(
            x=x, y=y, mode="lines", hoverinfo="skip", showlegend=False,
            xaxis=f"x{panel.suffix}", yaxis=f"y{panel.suffix}",
            line={"color": INK if dash == "solid" else FAINT, "width": 1, "dash": dash},
        )
    )  # fmt: skip


def _frame(
    fig: go.Figure, panel: _Panel, x: Mapping[str, object], y: Mapping[str, object], said: str
) -> None:
    """The panel's axes, its name and its figure."""
    fig.update_layout({
        f"xaxis{panel.suffix}": {**x, "domain": panel.x_domain, "anchor": f"y{panel.suffix}"},
        f"yaxis{panel.suffix}": {**y, "domain": panel.y_domain, "anchor": f"x{panel.suffix}"},
    })  # fmt: skip
    name = f"<b>{html.escape(shown(panel.family, 24))}</b>"
    beneath = f"<span style='color:{QUIET};font-size:11px'>{said}, n = {len(panel.points):,}</span>"
    fig.add_annotation(
        text=f"{name}<br>{beneath}", x=panel.x_domain[0], y=panel.y_domain[1], xref="paper",
        yref="paper", showarrow=False, xanchor="left", yanchor="bottom", yshift=3, align="left",
        borderpad=0, font={"size": 13, "color": INK},
    )  # fmt: skip


def _axis(
    low: float, high: float, ticks: Sequence[float], texts: Sequence[str]
) -> dict[str, object]:
    return {
        "type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": list(ticks),
        "ticktext": list(texts), "tickfont": {"size": 11, "color": QUIET}, "gridcolor": GRID,
        "linecolor": FAINT, "zeroline": False, "mirror": True, "showline": True,
    }  # fmt: skip


def _spread(*values: np.ndarray) -> tuple[float, float]:
    together = np.concatenate(values)
    low, high = float(together.min()) / 1.5, float(together.max()) * 1.5
    middle = math.sqrt(low * high)
    return min(low, middle / 4), max(high, middle * 4)


def _finish(
    fig: go.Figure,
    panels: Sequence[_Panel],
    kept: Points,
    points: Points,
    said: str,
    *,
    title: str,
    subtitle: str,
) -> None:
    """Title, legend and footnote, in a picture as high as its panels need."""
    note = f"{len(kept):,} of {len(points):,} points, thinned evenly by time. " if len(
        kept) < len(points) else ""  # fmt: skip
    style(
        fig,
        title=title,
        subtitle=subtitle,
        footnote=f"Ridgeplan. {note}{said}",
    )
    names = [shown(gpu, 24) for gpu in _colors(kept)]
    room = max(text_width(name, 12) for name in names) + 60
    top, bottom = 84, 74
    height = _shape(len(panels))[2] + top + bottom
    fig.update_layout(
        height=height,
        margin={"l": 64, "r": room, "t": top, "b": bottom},
        title={"x": 64 / WIDTH, "y": 1 - 30 / height},
        legend={
            "x": 1.01, "y": 1, "xanchor": "left", "yanchor": "top", "itemsizing": "constant",
            "font": {"size": 12, "color": QUIET}, "tracegroupgap": 0,
        },
    )  # fmt: skip
    fig.update_annotations(selector={"name": "footnote"}, yshift=-bottom + 8)


# ---- tables --------------------------------------------------------------------------------


def _heat(points: Points) -> str:
    """Mean error by family and GPU, redder where it is larger."""

    def cell(mine: Points) -> tuple[str, float, str]:
        e = errors(mine)
        error = e.mape or 0.0
        floor = noise_floor(mine)
        said = (
            f"n = {e.n:,}, bias {100 * (e.bias or 0.0):+.1f} %, roofline {percent(e.roofline_mape)}"
        )
        return percent(error), error / HEAT_TOP, said + (
            f", noise {percent(floor)}" if floor is not None else "")  # fmt: skip

    return section(
        "Mean absolute percentage error",
        "By family and GPU, in %; point at a cell for bias, roofline and noise.",
        _grid(points, cell),
    )


def _coverage(points: Points) -> str:
    """Share of rows inside the 80 % and the 90 % interval, darker the further from its level."""

    def cell(mine: Points) -> tuple[str, float, str]:
        e = errors(mine)
        inside = e.coverage_80 or 0.0, e.coverage_90 or 0.0
        off = max(abs(inside[0] - 0.8), abs(inside[1] - 0.9))
        return f"{100 * inside[0]:.0f} / {100 * inside[1]:.0f}", off / HEAT_TOP, f"n = {e.n:,}"

    return section(
        "Coverage of the intervals",
        "Rows inside the 80 % / 90 % interval, in %.",
        _grid(points, cell),
    )


def _grid(points: Points, cell: Callable[[Points], tuple[str, float, str]]) -> str:
    """A table of families by GPUs; `cell` gives text, heat from 0 to 1 and what pointing shows."""
    found = points.groups("family", "gpu")
    families = sorted({family for family, _ in found})
    gpus = sorted({gpu for _, gpu in found})
    lines = ["<table><tr><th></th>", *(_head(f) for f in families)]
    for gpu in gpus:
        lines.append(f"</tr><tr><th>{html.escape(shown(gpu, 24))}</th>")
        for family in families:
            mine = found.get((family, gpu))
            if mine is None:
                lines.append("<td></td>")
                continue
            text, heat, said = cell(mine)
            lines.append(f"<td style='background:{_tone(heat)}' title='{said}'>{text}</td>")
    return "".join([*lines, "</tr></table>"])


def _head(family: str) -> str:
    """A family above its column; it may wrap where its name has an underscore."""
    return f"<th>{html.escape(shown(family, 24)).replace('_', ' ')}</th>"


def _tone(heat: float) -> str:
    """White to vermilion; dark letters stay legible on all of it."""
    share = min(max(heat, 0.0), 1.0) * 0.75
    return "rgb({:.0f},{:.0f},{:.0f})".format(
        *(255 + share * (full - 255) for full in (213, 94, 0))
    )


def _families(comparison: Comparison) -> str:
    """Errors by family and by whose constants were used."""
    heads = ("family", "constants", "n", "roofline", "MAPE", "median", "p90", "bias", "in 80 %",
             "in 90 %")  # fmt: skip
    lines = ["<table><tr>", *(f"<th>{h}</th>" for h in heads), "</tr>"]
    for (family, scope), mine in comparison.points.groups("family", "scope").items():
        e = errors(mine)
        values = (e.roofline_mape, e.mape, e.median_ape, e.p90_ape, e.bias, e.coverage_80,
                  e.coverage_90)  # fmt: skip
        cells = (f"{e.n:,}", *map(percent, values))
        lines.append(
            f"<tr><th>{html.escape(shown(family))}</th><td class='text'>{scope}</td>"
            + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
        )  # fmt: skip
    promised = "; ".join(f"{b.name} {percent(b.fitted)}" for b in BARS)
    return section(
        "Errors by whose constants were used",
        f"In %. Own: fitted on other rows of that GPU. Promised there: {promised}.",
        "".join([*lines, "</table>"]),
    )


def _reasons(comparison: Comparison) -> str:
    counts = reason_counts(comparison)
    if not counts:
        return ""
    lines = ["<table><tr><th>family</th><th class='text'>reason</th><th>rows</th></tr>"]
    lines += [
        f"<tr><th>{html.escape(shown(family))}</th><td class='text'>"
        f"{html.escape(shown(reason, 200))}</td><td>{n:,}</td></tr>"
        for family, reason, n in counts
    ]
    return section("Rows without a prediction", "", "".join([*lines, "</table>"]))


def section(title: str, said: str, table: str) -> str:
    """A heading, a sentence, a table."""
    return f"<h2>{title}</h2><p>{html.escape(said)}</p>{table}"


def _css() -> Iterator[str]:
    yield f"body{{font:14px {FONT};color:{INK};background:white;width:{WIDTH}px;margin:24px auto}}"
    yield f"h1,h2,p,table{{margin-left:64px;margin-right:{MARGIN['r']}px}}"
    yield "h1{font-size:26px;margin-bottom:4px}h2{font-size:19px;margin:36px 64px 2px}"
    yield f"p{{color:{QUIET};margin-top:2px}}"
    yield "table{border-collapse:collapse;font-size:12px}"
    yield f"th,td{{padding:4px 7px;border-bottom:1px solid {GRID};text-align:right}}"
    yield f"th{{font-weight:600;color:{QUIET}}}tr th:first-child,.text{{text-align:left}}"
    yield "tr:first-child th{vertical-align:bottom;max-width:84px}"


_CSS: Final = "".join(_css())

"""Time against one parameter: a line per op and device, the binding resource as its markers."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Final

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cli.charts.picture import (
    FAINT,
    INK,
    MARGIN,
    PALETTE,
    QUIET,
    Box,
    Placer,
    log_axis,
    seconds_tick,
    source_line,
    style,
    text_width,
)
from cli.charts.plane import Plane, count_ticks, decades, spread
from cli.quantity import count_text, scaled_text, seconds_text
from cli.questions import Over
from cli.series import Crossover, Series, caption, rungs_text
from cli.wording import resource_text

DASHES: Final = ("solid", "dash", "dot", "dashdot")
SYMBOLS: Final = {
    "tensor": "circle", "vector": "square", "special": "diamond", "hbm": "triangle-up",
    "l2": "triangle-down", "llc": "hexagon", "smem": "cross", "register": "x",
}  # fmt: skip
MARK_SIZES: Final = {"triangle-up": 14, "triangle-down": 14, "diamond": 13}
"""Of the symbols that look small at the common size."""
MARK_SIZE: Final = 11
MOST_MARKERS: Final = 25
MOST_CROSSINGS: Final = 8
FOOTNOTE_CHARS: Final = 170


def figure(series: Sequence[Series], over: Over, crossings: Sequence[Crossover]) -> go.Figure:
    """The sweep as a slide: log-log, lines labelled at their ends, crossovers ringed."""
    key = over.key
    x_low, x_high = spread(over.values, 1.12, 1.12)
    ends = [t for s in series for t in (s.interval or (s.seconds,))]
    y_low, y_high = spread(np.concatenate(ends), 2.2, 2.2)
    room = _label_room(series)
    plane = Plane(x_low=x_low, x_high=x_high, y_low=y_low, y_high=y_high, right_margin=room)
    fig = go.Figure()
    by = _colored_by(series)
    colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(_unique(series, by))}
    dashes = _dashes(series)
    for s in series:
        if s.interval is not None:
            fig.add_trace(_band(s, s.interval, colors[getattr(s, by)]))
    for s in series:
        fig.add_trace(_line(s, colors[getattr(s, by)], dashes[s.op_name, s.device_id]))
        fig.add_trace(_markers(s, key, colors[getattr(s, by)]))
    _legend(fig, series)
    _end_labels(fig, plane, series, colors)
    _crossings(fig, plane, series, crossings, over)
    x_ticks, x_texts = count_ticks(x_low, x_high, powers_of_two=_powers_of_two(over))
    y_ticks = decades(y_low, y_high)
    fig.update_xaxes(log_axis(key, x_low, x_high, x_ticks, x_texts))
    fig.update_yaxes(log_axis("time", y_low, y_high, y_ticks, [seconds_tick(v) for v in y_ticks]))
    style(
        fig,
        title=_title(series, key),
        subtitle=caption(series),
        footnote=_footnote(series),
    )
    fig.update_layout(margin={**MARGIN, "r": room})
    return fig


def _dashes(series: Sequence[Series]) -> dict[tuple[str, str], str]:
    """Dashes tell devices apart; on one device, ops whose colours come round again."""
    ops, devices = _unique(series, "op_name"), _unique(series, "device_id")
    several = len(devices) > 1
    return {
        (op, device): DASHES[(j if several else i // len(PALETTE)) % len(DASHES)]
        for i, op in enumerate(ops)
        for j, device in enumerate(devices)
    }


def _powers_of_two(over: Over) -> bool:
    return all(v & (v - 1) == 0 for v in over.values)


def _unique(series: Sequence[Series], attribute: str) -> list[str]:
    return list(dict.fromkeys(getattr(s, attribute) for s in series))


def _colored_by(series: Sequence[Series]) -> str:
    """Colours tell ops apart, or devices where there is one op only."""
    return "op_name" if len(_unique(series, "op_name")) > 1 else "device_id"


def _line(s: Series, color: str, dash: str) -> go.Scatter:
    order = np.argsort(s.values)
    return go.Scatter(
        x=np.asarray(s.values, dtype=float)[order],
        y=s.seconds[order],
        mode="lines",
        line={"color": color, "width": 3, "dash": dash},
        hoverinfo="skip",
        showlegend=False,
    )


def _band(
    s: Series, interval: tuple[NDArray[np.float64], NDArray[np.float64]], color: str
) -> go.Scatter:
    """The 80 % interval as a pale area: out along the low ends, back along the high ones."""
    order = np.argsort(s.values)
    x = np.asarray(s.values, dtype=float)[order]
    low, high = interval[0][order], interval[1][order]
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([low, high[::-1]]),
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=color,
        opacity=0.14,
        hoverinfo="skip",
        showlegend=False,
    )


def _markers(s: Series, key: str, color: str) -> go.Scatter:
    shown = _marked(s)
    texts = [_hover(s, i, key) for i in shown]
    symbols = [SYMBOLS.get(str(s.bound[i]), "star") for i in shown]
    return go.Scatter(
        x=[s.values[i] for i in shown],
        y=s.seconds[shown],
        mode="markers",
        marker={
            "symbol": symbols,
            "size": [MARK_SIZES.get(symbol, MARK_SIZE) for symbol in symbols],
            "opacity": 1,  # sizes in a list would make plotly's default translucent
            "color": color,
            "line": {"color": "white", "width": 1.5},
        },
        hovertext=texts,
        hoverinfo="text",
        showlegend=False,
    )


def _marked(s: Series) -> list[int]:
    """Indices that carry a marker: all of a short sweep, else some and every change of bound."""
    number = len(s.values)
    if number <= MOST_MARKERS:
        return list(range(number))
    even = {round(i * (number - 1) / (MOST_MARKERS - 1)) for i in range(MOST_MARKERS)}
    changes = np.flatnonzero(s.bound[1:] != s.bound[:-1]) + 1
    return sorted(even | {int(i) for i in changes[:MOST_MARKERS]})


def _hover(s: Series, i: int, key: str) -> str:
    parts = [
        f"{name}: {seconds_text(float(s.along(seconds)[i]))}"
        for name, seconds in s.estimate.seconds_by_resource.items()
    ]
    head = f"<b>{s.op_name}</b> on {s.device_id}<br>{key} = {s.values[i]:,}"
    moved = scaled_text(float(s.along(s.estimate.bytes_by_level["hbm"])[i]), "B")
    time = f"{_time(s, i)}, bound by {resource_text(str(s.bound[i]))}"
    return "<br>".join([head, time, f"HBM traffic {moved}", *parts])


def _time(s: Series, i: int) -> str:
    text = seconds_text(float(s.seconds[i]))
    if s.interval is None:
        return text
    low, high = (seconds_text(float(end[i])) for end in s.interval)
    return f"{text} (80 %: {low} to {high})"


def _legend(fig: go.Figure, series: Sequence[Series]) -> None:
    """Marker shapes in grey, for the resources that bind somewhere; dashes where devices differ."""
    bounds = {str(b) for s in series for b in s.bound}
    for resource in [r for r in SYMBOLS if r in bounds]:
        fig.add_trace(
            go.Scatter(
                x=[None], y=[None], mode="markers", name=f"bound by {resource_text(resource)}",
                marker={"symbol": SYMBOLS[resource], "color": QUIET,
                        "size": MARK_SIZES.get(SYMBOLS[resource], MARK_SIZE)},
            )
        )  # fmt: skip
    devices = _unique(series, "device_id")
    for i, device in enumerate(devices if len(devices) > 1 else []):
        fig.add_trace(
            go.Scatter(
                x=[None], y=[None], mode="lines", name=device,
                line={"color": QUIET, "width": 2.5, "dash": DASHES[i % 4]},
            )
        )  # fmt: skip
    fig.update_layout(
        showlegend=True,
        legend={
            "x": 0.002, "y": 1.0, "xanchor": "left", "yanchor": "top",
            "bgcolor": "white", "font": {"size": 13, "color": QUIET},
            "itemclick": False, "itemdoubleclick": False,
        },
    )  # fmt: skip


def _label_room(series: Sequence[Series]) -> float:
    """Pixels at the right for the longest name of a line."""
    names = [text_width(s.op_name, 14) for s in series]
    if len(_unique(series, "device_id")) > 1:
        names += [text_width(s.device_id, 12) for s in series]
    return min(max(names) + 48, 300)


def _end_labels(
    fig: go.Figure, plane: Plane, series: Sequence[Series], colors: dict[str, str]
) -> None:
    """The name of each line beside its right end, pushed apart where ends lie close."""
    several = len(_unique(series, "device_id")) > 1
    last = int(np.argmax(series[0].values))
    ends = sorted(
        ((plane.pixel(s.values[last], float(s.seconds[last]))[1], s) for s in series),
        key=lambda end: end[0],
    )
    gap = 38.0 if several else 22.0
    heights = _pushed_apart([height for height, _ in ends], gap)
    for (wanted, s), height in zip(ends, heights, strict=True):
        second = f"<br><span style='font-size:12px'>{s.device_id}</span>" if several else ""
        fig.add_annotation(
            text=f"<b>{s.op_name}</b>{second}",
            x=math.log10(s.values[last]),
            y=math.log10(float(s.seconds[last])),
            xshift=14,
            yshift=height - wanted,
            xanchor="left",
            align="left",
            showarrow=False,
            font={"size": 14, "color": colors[getattr(s, _colored_by(series))]},
        )


def _pushed_apart(heights: Sequence[float], gap: float) -> list[float]:
    """The same ascending heights at least `gap` apart, moved as little as one pass allows."""
    placed: list[list[float]] = []  # runs of labels that touch
    for height in heights:
        placed.append([height])
        while len(placed) > 1 and _top(placed[-2], gap) + gap > _bottom(placed[-1], gap):
            placed[-2:] = [placed[-2] + placed[-1]]
    return [_bottom(run, gap) + gap * i for run in placed for i in range(len(run))]


def _bottom(run: Sequence[float], gap: float) -> float:
    return sum(run) / len(run) - gap * (len(run) - 1) / 2


def _top(run: Sequence[float], gap: float) -> float:
    return _bottom(run, gap) + gap * (len(run) - 1)


def _crossings(
    fig: go.Figure,
    plane: Plane,
    series: Sequence[Series],
    crossings: Sequence[Crossover],
    over: Over,
) -> None:
    placer = Placer(plane.frame)
    for s in series:
        points = [plane.pixel(v, float(t)) for v, t in zip(s.values, s.seconds, strict=True)]
        points = points[:: max(len(points) // 200, 1)]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            placer.keep_line_clear(x0, y0, x1, y1)
    placer.taken.append(_legend_box(fig, plane))
    shown = crossings[:MOST_CROSSINGS]
    for c in shown:
        placer.keep_clear(*plane.pixel(c.value, c.seconds), 10)
    several = len(_unique(series, "device_id")) > 1
    for c in shown:
        fig.add_trace(
            go.Scatter(
                x=[c.value], y=[c.seconds], mode="markers", showlegend=False,
                marker={"symbol": "circle-open", "size": 20, "color": INK, "line": {"width": 2}},
                hoverinfo="text",
                hovertext=[f"{c.faster} overtakes {c.slower}<br>on {c.device} from "
                           f"{over.key} = {c.value:,.0f}"],
            )
        )  # fmt: skip
        where = f"{over.key} ≈ {_about(c.value, powers_of_two=_powers_of_two(over))}"
        # Among many lines a note must be short; the ring says the rest when pointed at.
        text = where if several else f"{c.faster} overtakes<br>from {where}"
        spot = placer.place(*plane.pixel(c.value, c.seconds), text, 13)
        if spot is not None:
            _note(fig, c.value, c.seconds, text, spot)


def _legend_box(fig: go.Figure, plane: Plane) -> Box:
    """The place of the legend in the upper left corner."""
    num_entries = sum(1 for trace in fig.data if trace.name)
    frame = plane.frame
    return Box(frame.left, frame.top - 20 * num_entries - 24, frame.left + 240, frame.top)


def _about(value: float, *, powers_of_two: bool) -> str:
    """A crossover to the precision it has, in the prefixes of the axis."""
    if powers_of_two and value >= 10_240:
        return count_text(round(value / 1024) * 1024)
    return f"{float(f'{value:.2g}'):,.0f}"


def _note(
    fig: go.Figure, x: float, y: float, text: str, spot: tuple[float, float, str, str]
) -> None:
    dx, dy, xanchor, yanchor = spot
    if math.hypot(dx, dy) > 30:
        fig.add_annotation(
            text="", x=math.log10(x), y=math.log10(y), ax=dx, ay=-dy, showarrow=True,
            arrowhead=0, arrowwidth=1, arrowcolor=QUIET, standoff=10,
        )  # fmt: skip
    fig.add_annotation(
        text=text, x=math.log10(x), y=math.log10(y), xshift=dx, yshift=dy,
        xanchor=xanchor, yanchor=yanchor, showarrow=False, align="left",
        font={"size": 13, "color": INK},
    )  # fmt: skip


def _title(series: Sequence[Series], key: str) -> str:
    ops, devices = _unique(series, "op_name"), _unique(series, "device_id")
    what = " vs ".join(ops) if len(ops) <= 3 else f"{len(ops)} ops"
    where = devices[0] if len(devices) == 1 else f"{len(devices)} devices"
    return f"{what} on {where}: time over {key}"


def _footnote(series: Sequence[Series]) -> str:
    devices = {s.device_id: s.estimate.device for s in series}
    lines = textwrap.wrap(f"Ridgeplan. {rungs_text(series)}.", FOOTNOTE_CHARS)
    return (
        f"{'<br>'.join(lines[:2])}{' ...' if len(lines) > 2 else ''}<br>"
        f"<span style='color:{FAINT}'>{source_line(list(devices.values()))}</span>"
    )

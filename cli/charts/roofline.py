"""The roofline as a slide: a panel per device, its roofs and ridges, and the ops under them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, TypeAlias

import plotly.graph_objects as go

from cli.charts.picture import (
    FAINT,
    INK,
    PALETTE,
    QUIET,
    Box,
    Placer,
    log_axis,
    source_line,
    style,
    text_width,
)
from cli.charts.plane import Plane, decades, plain_decade, spread
from cli.quantity import count_text, digits, scaled_text, seconds_text
from cli.questions import Over
from cli.roofs import Place, Roofs
from cli.series import caption
from cli.wording import resource_text

Panels: TypeAlias = Sequence[tuple[Roofs, Sequence[Place]]]

LEVEL_NAMES: Final = {
    "hbm": "HBM",
    "l2": "L2",
    "smem": "shared memory",
    "llc": "LLC",
    "register": "registers",
}
SHORT_NAMES: Final = {"hbm": "HBM", "l2": "L2", "smem": "shared-memory", "special": "special-op"}
LEVEL_SYMBOLS: Final = {
    "hbm": "circle",
    "l2": "square-open",
    "smem": "diamond-open",
    "llc": "hexagon-open",
}
FILL: Final = "rgba(0,114,178,0.05)"


def figure(panels: Panels, over: Over | None) -> go.Figure:
    """One panel per device on common axes; with a sweep, each op is a path of HBM points."""
    fig = go.Figure()
    names = dict.fromkeys(place.series.op_name for _, places in panels for place in places)
    colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    for number, ((roofs, places), plane) in enumerate(zip(panels, _planes(panels), strict=True)):
        _Panel(fig, plane, number + 1, roofs, places, over, colors).draw()
    _legend(fig, panels, colors, over)
    style(
        fig,
        title=_title(panels, list(names), over),
        subtitle=caption([p.series for _, places in panels for p in places]),
        footnote=_footnote(panels, over),
    )
    return fig


def _planes(panels: Panels) -> list[Plane]:
    places = [place for _, found in panels for place in found]
    ridges = [ridge.flops_per_byte for roofs, _ in panels for ridge in roofs.ridges]
    peaks = [roof.flops_per_s for roofs, _ in panels for roof in roofs.compute]
    rates = [float(v) for place in places for v in place.flops_per_s]
    marks = [float(v) for place in places for level in place.intensity.values() for v in level]
    x_low, x_high = spread([*marks, *ridges], 4, 6)
    y_low, y_high = spread([*rates, *peaks], 3.5, 3.5)
    return [
        Plane(x_low=x_low, x_high=x_high, y_low=y_low, y_high=y_high, x_domain=x, y_domain=y)
        for x, y in _domains(len(panels))
    ]


def _domains(number: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    if number == 1:
        return [((0.0, 1.0), (0.0, 1.0))]
    left, right = (0.0, 0.485), (0.515, 1.0)
    if number == 2:
        return [(left, (0.0, 1.0)), (right, (0.0, 1.0))]
    top, bottom = (0.54, 1.0), (0.0, 0.46)
    return [(left, top), (right, top), (left, bottom), (right, bottom)][:number]


class _Panel:
    """Draws one device's panel; labels are placed once every line and marker is known."""

    def __init__(
        self,
        fig: go.Figure,
        plane: Plane,
        number: int,
        roofs: Roofs,
        places: Sequence[Place],
        over: Over | None,
        colors: dict[str, str],
    ) -> None:
        self.fig, self.plane, self.roofs, self.places = fig, plane, roofs, places
        self.over, self.colors = over, colors
        self.suffix = "" if number == 1 else str(number)
        self.axes = {"xaxis": f"x{self.suffix}", "yaxis": f"y{self.suffix}"}
        self.number, self.placer = number, Placer(plane.frame)
        self.markers: list[Box] = []
        self.lines: dict[str, list[Box]] = {}  # of each roof
        self.alone = plane.x_domain == (0.0, 1.0)
        # Three or four panels share the picture: smaller words, fewer of them.
        self.small = plane.y_domain[1] - plane.y_domain[0] < 0.9

    def draw(self) -> None:
        self._axes()
        self._roofs()
        paths = self.over is not None and len(self.over.values) > 1
        for place in self.places:
            (self._path if paths else self._point)(place)
        if not self.alone:
            self._device_name()
        self._ridges()
        self._roof_labels()
        for place in self.places:
            self._name(place, paths)
        if paths:
            for place in self.places:
                self._path_values(place)

    def _device_name(self) -> None:
        p, size = self.plane, self._size(16)
        self._text(
            f"<b>{self.roofs.device.id}</b>", p.x_low, p.y_high, dx=12, dy=-1.7 * size,
            xanchor="left", yanchor="bottom", color=INK, size=size,
        )  # fmt: skip

    # ---- axes and roofs ------------------------------------------------------------------------

    def _axes(self) -> None:
        p = self.plane
        x_ticks, y_ticks = decades(p.x_low, p.x_high), decades(p.y_low, p.y_high)
        bottom_row, left_column = p.y_domain[0] == 0.0, p.x_domain[0] == 0.0
        x_title = "arithmetic intensity (FLOP/byte)" if bottom_row else ""
        y_title = "performance (TFLOP/s)" if left_column else ""
        texts = [plain_decade(v) for v in x_ticks], [plain_decade(v / 1e12) for v in y_ticks]
        self.fig.update_layout({
            f"xaxis{self.suffix}": log_axis(
                x_title, p.x_low, p.x_high, x_ticks, texts[0],
                domain=list(p.x_domain), anchor=self.axes["yaxis"],
            ),
            f"yaxis{self.suffix}": log_axis(
                y_title, p.y_low, p.y_high, y_ticks, texts[1] if left_column else [""] * 99,
                domain=list(p.y_domain), anchor=self.axes["xaxis"],
            ),
        })  # fmt: skip

    def _roofs(self) -> None:
        top, hbm = self.roofs.compute[0], self.roofs.memory[-1]
        p = self.plane
        corner = top.flops_per_s / hbm.bytes_per_s
        start = max(p.x_low, p.y_low / hbm.bytes_per_s)
        self._trace(
            x=[start, corner, p.x_high, p.x_high, start],
            y=[start * hbm.bytes_per_s, top.flops_per_s, top.flops_per_s, p.y_low, p.y_low],
            mode="lines", line={"width": 0}, fill="toself", fillcolor=FILL, hoverinfo="skip",
        )  # fmt: skip
        fastest = self.roofs.memory[0].bytes_per_s
        for roof in self.roofs.compute:
            self._flat(roof.name, roof.flops_per_s, roof.flops_per_s / fastest, roof is top)
        for memory in self.roofs.memory:
            self._slanted(memory.level, memory.bytes_per_s, top.flops_per_s, memory is hbm)

    def _flat(self, name: str, rate: float, start: float, is_top: bool) -> None:
        start = max(start, self.plane.x_low)
        line = {"color": INK if is_top else QUIET, "width": 2.6 if is_top else 1.8}
        if not is_top:
            line["dash"] = "dash"
        self._trace(
            x=[start, self.plane.x_high], y=[rate, rate], mode="lines", line=line,
            hoverinfo="text", hovertext=f"{name}: {scaled_text(rate, 'FLOP/s')}",
        )  # fmt: skip
        self.lines[name] = self._keep_line(start, rate, self.plane.x_high, rate)

    def _roof_labels(self) -> None:
        top, hbm = self.roofs.compute[0], self.roofs.memory[-1]
        for roof in self.roofs.compute:
            self._flat_label(roof.name, roof.flops_per_s, is_top=roof is top)
        for memory in self.roofs.memory:
            color = INK if memory is hbm else QUIET
            self._slanted_label(memory.level, memory.bytes_per_s, top.flops_per_s, color)

    def _flat_label(self, name: str, rate: float, *, is_top: bool) -> None:
        """The roof's name above it, as low and as far to the right as there is room."""
        size = self._size(14 if is_top else 13)
        text = f"{name}  {scaled_text(rate, 'FLOP/s')}"
        start = rate / self.roofs.memory[0].bytes_per_s
        left, y = self.plane.pixel(max(start, self.plane.x_low), rate)
        right, wide = self.plane.frame.right, text_width(text, size)
        for lift in (3, 11, 30, 46):
            for back in range(6, int(right - left - wide), 8):
                box = Box(right - back - wide, y + lift, right - back, y + lift + 1.2 * size)
                if self.placer.free(box):
                    self._text(
                        text, self.plane.x_high, rate, dx=-back, dy=lift, xanchor="right",
                        yanchor="bottom", color=INK if is_top else QUIET, size=size,
                    )  # fmt: skip
                    return

    def _slanted(self, level: str, bandwidth: float, top: float, is_hbm: bool) -> None:
        p = self.plane
        start, end = max(p.x_low, p.y_low / bandwidth), top / bandwidth
        if start >= end:
            return
        color = INK if is_hbm else FAINT
        self._trace(
            x=[start, end], y=[start * bandwidth, top], mode="lines",
            line={"color": color, "width": 2.6 if is_hbm else 1.6},
            hoverinfo="text",
            hovertext=f"{LEVEL_NAMES.get(level, level)}: {scaled_text(bandwidth, 'B/s')}",
        )  # fmt: skip
        self.lines[level] = self._keep_line(start, start * bandwidth, end, top)

    def _slanted_label(self, level: str, bandwidth: float, top: float, color: str) -> None:
        """The level's name along its roof, above the line, as low as markers leave room."""
        start, end = max(self.plane.x_low, self.plane.y_low / bandwidth), top / bandwidth
        size = self._size(13)
        text = f"{LEVEL_NAMES.get(level, level)}  {scaled_text(bandwidth, 'B/s')}"
        radians = math.radians(self.plane.slope_degrees())
        x0, y0 = self.plane.pixel(start, start * bandwidth)
        x1, y1 = self.plane.pixel(end, end * bandwidth)
        length, wide = math.hypot(x1 - x0, y1 - y0), text_width(text, size)
        lift = 0.5 * size + 4
        dx, dy = -lift * math.sin(radians), lift * math.cos(radians)
        others = [box for name, line in self.lines.items() if name != level for box in line]
        for taken in (self.markers + others, self.markers):  # over another roof if need be
            for along in range(int(wide / 2 + 26), int(length - wide / 2 - 10), 10):
                part = along / length
                cx, cy = x0 + part * (x1 - x0) + dx, y0 + part * (y1 - y0) + dy
                boxes = _chain(cx, cy, radians, wide, 0.5 * size)
                if any(box.overlaps(mark) for box in boxes for mark in taken):
                    continue
                x = start * (end / start) ** part
                self._text(
                    text, x, x * bandwidth, dx=dx, dy=dy, xanchor="center", yanchor="middle",
                    color=color, size=size, textangle=-math.degrees(radians), reserve=False,
                )  # fmt: skip
                self.placer.taken += boxes
                return

    def _ridges(self) -> None:
        """The corners of the top roof, each with its intensity where there is room for it."""
        top = self.roofs.compute[0]
        for ridge in reversed(self.roofs.ridges):  # HBM's, the last, first
            x, is_hbm = ridge.flops_per_byte, ridge.level == "hbm"
            if ridge.roof != top.name or x < self.plane.x_low:
                continue
            level = LEVEL_NAMES.get(ridge.level, ridge.level)
            self._trace(
                x=[x], y=[top.flops_per_s], mode="markers",
                marker={"symbol": "circle", "size": 7, "color": INK}, hoverinfo="text",
                hovertext=f"{level} ridge of the {top.name} roof: {digits(x)} FLOP/byte",
            )  # fmt: skip
            self._ridge_label(x, top.flops_per_s, is_hbm=is_hbm)

    def _ridge_label(self, x: float, rate: float, *, is_hbm: bool) -> None:
        text, size = f"ridge {digits(x)}", self._size(12)
        px, py = self.plane.pixel(x, rate)
        half = text_width(text, size) / 2
        if self.placer.free(Box(px - half - 4, py + 11, px + half + 4, py + 11 + 1.2 * size)):
            self._text(
                text, x, rate, dx=0, dy=11, xanchor="center", yanchor="bottom", size=size,
                color=INK if is_hbm else QUIET,
            )  # fmt: skip

    # ---- ops -----------------------------------------------------------------------------------

    def _point(self, place: Place) -> None:
        """One op: filled at its HBM intensity, hollow at the other levels, one height."""
        color, rate = self.colors[place.series.op_name], float(place.flops_per_s[0])
        spots = {level: float(x[0]) for level, x in place.intensity.items()}
        if len(spots) > 1:
            self._trace(
                x=[min(spots.values()), max(spots.values())], y=[rate, rate], mode="lines",
                line={"color": color, "width": 1.4, "dash": "dot"}, hoverinfo="skip",
            )  # fmt: skip
        for level, x in spots.items():
            filled = level == "hbm"
            self._trace(
                x=[x], y=[rate], mode="markers",
                marker={
                    "symbol": LEVEL_SYMBOLS.get(level, "triangle-up-open"),
                    "size": 15 if filled else 11,
                    "color": color,
                    "line": {"color": "white" if filled else color, "width": 1.8},
                },
                hoverinfo="text", hovertext=self._hover(place, 0, level),
            )  # fmt: skip
            self._keep_marker(x, rate, 9)

    def _path(self, place: Place) -> None:
        """One op over the sweep: its HBM points, joined."""
        color, xs = self.colors[place.series.op_name], place.intensity["hbm"]
        numbers = range(len(place.series.values))
        self._trace(
            x=xs, y=place.flops_per_s, mode="lines+markers",
            line={"color": color, "width": 2.4},
            marker={"size": 10, "color": color, "line": {"color": "white", "width": 1.4}},
            hoverinfo="text", hovertext=[self._hover(place, i, "hbm") for i in numbers],
        )  # fmt: skip
        spots = [(float(x), float(y)) for x, y in zip(xs, place.flops_per_s, strict=True)]
        for x, y in spots:
            self._keep_marker(x, y, 6)
        for (x0, y0), (x1, y1) in pairwise(spots):
            self._keep_line(x0, y0, x1, y1)

    def _name(self, place: Place, paths: bool) -> None:
        """The op's name beside its HBM point: the last one of a path."""
        i = len(place.series.values) - 1
        x, y = self._spot(place, i)
        name = place.series.op_name
        time = seconds_text(float(place.series.seconds[i]))
        rate = scaled_text(float(place.flops_per_s[i]), "FLOP/s")
        bound = str(place.series.bound[i])
        second = f"{rate}, {time}, {SHORT_NAMES.get(bound, bound)}-bound"
        if paths:
            second = self._last_value_text(place)
        color, size = self.colors[name], self._size(15)
        if not self.alone:  # the legend has the names
            text = second if paths else f"{rate}, {time}"
            self._placed(text, x, y, color=color, size=self._size(13), measured=text)
            return
        wide = second if len(second) * 0.84 > len(name) else name
        small = f"<span style='font-size:{self._size(12)}px'>{second}</span>"
        whole = f"<b>{name}</b><br>{small}"
        if not self._placed(whole, x, y, color=color, size=size, measured=f"{wide}<br>"):
            self._placed(f"<b>{name}</b>", x, y, color=color, size=size, measured=name)

    def _path_values(self, place: Place) -> None:
        """Swept values beside the path: its start, and others where they stand apart."""
        last = len(place.series.values) - 1
        step = max(round(last / 4), 1)
        told = [self._spot(place, last)]
        for i in range(0, last, step):
            x, y = self._spot(place, i)
            if min(math.dist(self.plane.pixel(x, y), self.plane.pixel(*spot)) for spot in told) < 9:
                continue
            told.append((x, y))
            text = self._value_text(place, i) if i == 0 else self._value(i)
            color = self.colors[place.series.op_name]
            self._placed(text, x, y, color=color, size=self._size(12), measured=text, near=True)

    def _spot(self, place: Place, i: int) -> tuple[float, float]:
        return float(place.intensity["hbm"][i]), float(place.flops_per_s[i])

    def _last_value_text(self, place: Place) -> str:
        """The last value, or the whole range where the path is a single spot."""
        last = len(place.series.values) - 1
        pixels = [self.plane.pixel(*self._spot(place, i)) for i in range(last + 1)]
        if max(math.dist(pixel, pixels[-1]) for pixel in pixels) < 9:
            return f"{self._value_text(place, 0)} to {self._value(last)}"
        return self._value_text(place, last)

    def _value_text(self, place: Place, i: int) -> str:
        assert self.over is not None
        return f"{self.over.key} = {self._value(i)}"

    def _value(self, i: int) -> str:
        assert self.over is not None
        return count_text(self.over.values[i])

    def _hover(self, place: Place, i: int, level: str) -> str:
        s = place.series
        lines = [
            f"<b>{s.op_name}</b> on {s.device_id}",
            f"{scaled_text(float(place.flops_per_s[i]), 'FLOP/s')} at the lower bound",
            f"{digits(float(place.intensity[level][i]))} FLOP per byte of "
            f"{LEVEL_NAMES.get(level, level)}",
            f"{seconds_text(float(s.seconds[i]))}, bound by {resource_text(str(s.bound[i]))}",
        ]
        if self.over is not None:
            lines.insert(1, self._value_text(place, i))
        return "<br>".join(lines)

    # ---- primitives ----------------------------------------------------------------------------

    def _size(self, size: float) -> float:
        return size - 2 if self.small else size

    def _trace(self, **settings: object) -> None:
        self.fig.add_trace(go.Scatter(showlegend=False, **self.axes, **settings))

    def _keep_marker(self, x: float, y: float, radius: float) -> None:
        self.placer.keep_clear(*self.plane.pixel(x, y), radius)
        self.markers.append(self.placer.taken[-1])

    def _keep_line(self, x0: float, y0: float, x1: float, y1: float) -> list[Box]:
        before = len(self.placer.taken)
        self.placer.keep_line_clear(*self.plane.pixel(x0, y0), *self.plane.pixel(x1, y1))
        return self.placer.taken[before:]

    def _text(
        self, text: str, x: float, y: float, *, dx: float, dy: float, xanchor: str, yanchor: str,
        color: str, size: float, textangle: float = 0.0, reserve: bool = True,
    ) -> None:  # fmt: skip
        self.fig.add_annotation(
            text=text, x=math.log10(x), y=math.log10(y), xref=self.axes["xaxis"],
            yref=self.axes["yaxis"], xshift=dx, yshift=dy, xanchor=xanchor, yanchor=yanchor,
            showarrow=False, textangle=textangle, align="left", borderpad=0,
            font={"size": size, "color": color},
        )  # fmt: skip
        if reserve:
            px, py = self.plane.pixel(x, y)
            wide = text_width(text, size)
            left = px + dx - {"left": 0.0, "center": wide / 2, "right": wide}[xanchor]
            self.placer.taken.append(Box(left, py + dy, left + wide, py + dy + 1.2 * size))

    def _placed(
        self, text: str, x: float, y: float, *, color: str, size: float, measured: str,
        near: bool = False,
    ) -> bool:  # fmt: skip
        """A label where there is room for it; tied to its point by a thin line if far away."""
        spot = self.placer.place(*self.plane.pixel(x, y), measured, size, near=near)
        if spot is None:
            return False
        dx, dy, xanchor, yanchor = spot
        if math.hypot(dx, dy) > 30:
            self._leader(x, y, dx, dy, color)
        self._text(
            text, x, y, dx=dx, dy=dy, xanchor=xanchor, yanchor=yanchor, color=color, size=size,
            reserve=False,
        )  # fmt: skip
        return True

    def _leader(self, x: float, y: float, dx: float, dy: float, color: str) -> None:
        self.fig.add_annotation(
            text="", x=math.log10(x), y=math.log10(y), xref=self.axes["xaxis"],
            yref=self.axes["yaxis"], ax=dx, ay=-dy, showarrow=True, arrowhead=0, arrowwidth=1,
            arrowcolor=color, standoff=8,
        )  # fmt: skip


def _chain(x: float, y: float, radians: float, wide: float, radius: float) -> list[Box]:
    """Small boxes along a turned text of that width, centred on a pixel."""
    steps = [i / 12 * wide for i in range(-6, 7)]
    centres = [(x + s * math.cos(radians), y + s * math.sin(radians)) for s in steps]
    return [Box(cx - radius, cy - radius, cx + radius, cy + radius) for cx, cy in centres]


def _legend(fig: go.Figure, panels: Panels, colors: dict[str, str], over: Over | None) -> None:
    """What the marker shapes mean; the ops' colours where several panels share them."""
    levels = {level for _, places in panels for place in places for level in place.intensity}
    paths = over is not None and len(over.values) > 1
    marks = [
        (f"by {LEVEL_NAMES[level]} traffic", LEVEL_SYMBOLS[level], QUIET)
        for level in LEVEL_SYMBOLS
        if level in levels and not paths
    ]
    marks = marks if len(marks) > 1 else []
    if len(panels) > 1:
        marks = [(name, "circle", color) for name, color in colors.items()] + marks
    for name, symbol, color in marks:
        fig.add_trace(
            go.Scatter(
                x=[None], y=[None], mode="markers", name=name,
                marker={"symbol": symbol, "size": 11, "color": color,
                        "line": {"width": 1.8, "color": color}},
            )
        )  # fmt: skip
    fig.update_layout(
        showlegend=bool(marks),
        legend={
            "orientation": "h", "x": 1, "y": 1.004, "xanchor": "right", "yanchor": "bottom",
            "font": {"size": 13, "color": QUIET}, "itemclick": False, "itemdoubleclick": False,
        },
    )  # fmt: skip


def _title(panels: Panels, names: Sequence[str], over: Over | None) -> str:
    devices = " and ".join(roofs.device.id for roofs, _ in panels)
    devices = devices if len(panels) <= 2 else f"{len(panels)} devices"
    swept = f", {over.key} swept" if over is not None else ""
    ops = ", ".join(names) if len(names) <= 3 else f"{len(names)} ops"
    return f"Roofline of {ops} on {devices}{swept}"


def _footnote(panels: Panels, over: Over | None) -> str:
    paths = " Paths by HBM traffic." if over is not None else ""
    return (
        f"Ridgeplan, bound rung: peaks and lower bounds, a real kernel is slower.{paths}<br>"
        f"<span style='color:{FAINT}'>{source_line([roofs.device for roofs, _ in panels])}</span>"
    )

"""Addresses over time: every tensor a box, the live bytes as a line under the planned peak."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import plotly.graph_objects as go

from cli.charts.picture import FAINT, GRID, INK, PALETTE, QUIET, style
from cli.memory_plans import gib
from cli.quantity import percent_text, scaled_text

if TYPE_CHECKING:
    from simulator.planners.storage import Placement

MOST_KINDS: Final = len(PALETTE) - 1
OTHER: Final = "other"
UNITS: Final = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def figure(found: Placement, title: str, note: str = "") -> go.Figure:
    """The placement as a slide."""
    fig = go.Figure()
    unit, word = next((u for u in UNITS if found.peak_bytes >= u[0]), UNITS[-1])
    for label, members, color in _groups(found):
        fig.add_trace(_boxes(found, members, label, color, unit))
    moments, live = found.tensors.live
    fig.add_trace(
        go.Scatter(
            x=moments.tolist(), y=(live / unit).tolist(), mode="lines", name="alive",
            line={"color": INK, "width": 2, "shape": "hv"},
            hovertemplate="%{y:.4g} " + word + " alive<extra></extra>",
        )
    )  # fmt: skip
    fig.add_hline(y=found.peak_bytes / unit, line={"color": FAINT, "dash": "dash"})
    style(
        fig,
        title=title,
        subtitle=f"{len(found.tensors):,} tensors in {gib(found.peak_bytes)}, "
        f"{percent_text(found.above_live_frac)} above what is alive at once",
        footnote=f"Placed {found.method}; proven: at least "
        f"{gib(found.lower_bytes)}. {note}".rstrip(),
    )
    axis = {"gridcolor": GRID, "linecolor": FAINT, "zeroline": False, "tickfont": {"color": QUIET}}
    fig.update_layout(
        xaxis={**axis, "title": {"text": "request, in order"}},
        yaxis={**axis, "title": {"text": f"address, {word}"}, "rangemode": "tozero"},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"},
    )
    return fig


def _groups(found: Placement) -> list[tuple[str, list[int], str]]:
    """Tensors by kind, those of most bytes first; what has no colour left is 'other'."""
    kinds = found.tensors.kinds or ("tensors",) * len(found.tensors)
    sizes: Counter[str] = Counter()
    for kind, size in zip(kinds, found.tensors.sizes.tolist(), strict=True):
        sizes[kind] += size
    named = [kind for kind, _ in sizes.most_common(MOST_KINDS)]
    groups: dict[str, list[int]] = {kind: [] for kind in named}
    for i, kind in enumerate(kinds):
        groups.setdefault(kind if kind in named else OTHER, []).append(i)
    return [
        (kind, members, color)
        for (kind, members), color in zip(groups.items(), PALETTE, strict=False)
    ]


def _boxes(found: Placement, members: list[int], label: str, color: str, unit: int) -> go.Scatter:
    """The boxes of a group as one closed path with gaps, its names at the corners."""
    t = found.tensors
    x: list[float | None] = []
    y: list[float | None] = []
    texts: list[str] = []
    for i in members:
        low, high = found.addresses[i] / unit, (found.addresses[i] + t.sizes[i]) / unit
        start, end = int(t.starts[i]), int(t.ends[i])
        x += [start, end, end, start, start, None]
        y += [low, low, high, high, low, None]
        texts += [f"{t.names[i]}<br>{scaled_text(float(t.sizes[i]), 'B')}"] * 5 + [""]
    return go.Scatter(
        x=x, y=y, mode="lines", fill="toself", name=label, text=texts, hoverinfo="text",
        line={"color": "white", "width": 0.5}, fillcolor=color, opacity=0.85,
    )  # fmt: skip

"""Boxes in a plane by kind: units on ranks over time, prompts in rows over tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import plotly.graph_objects as go

from cli.charts.picture import FAINT, GRID, MARGIN, PALETTE, QUIET, shortened, style

Box: TypeAlias = tuple[float, float, float, float, str]
"""Left, right, bottom, top, and what is told of it."""


def figure(
    kinds: Mapping[str, Iterable[Box]],
    *,
    title: str,
    subtitle: str,
    footnote: str,
    axes: tuple[str, str],
    mark: float | None = None,
) -> go.Figure:
    """Every kind in its colour; `mark`: a dashed line at that place of the first axis."""
    fig = go.Figure()
    for k, (label, boxes) in enumerate(kinds.items()):
        fig.add_trace(_boxes(list(boxes), label, PALETTE[k % len(PALETTE)]))
    if mark is not None:
        fig.add_vline(x=mark, line={"color": QUIET, "dash": "dash"})
    style(fig, title=shortened(title, 84), subtitle=subtitle, footnote=footnote)
    axis = {"gridcolor": GRID, "linecolor": FAINT, "zeroline": False, "tickfont": {"color": QUIET}}
    fig.update_layout(
        xaxis={**axis, "title": {"text": axes[0]}, "rangemode": "tozero"},
        yaxis={**axis, "title": {"text": axes[1]}, "autorange": "reversed", "showgrid": False},
        margin={**MARGIN, "t": 118},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"},
    )
    return fig


def _boxes(boxes: list[Box], label: str, color: str) -> go.Scatter:
    """Closed paths with gaps between them, their words at the corners."""
    x: list[float | None] = []
    y: list[float | None] = []
    texts: list[str] = []
    for left, right, low, high, words in boxes:
        x += [left, right, right, left, left, None]
        y += [low, low, high, high, low, None]
        texts += [words] * 5 + [""]
    return go.Scatter(
        x=x, y=y, mode="lines", fill="toself", name=label, text=texts, hoverinfo="text",
        line={"color": "white", "width": 0.5}, fillcolor=color, opacity=0.85,
    )  # fmt: skip

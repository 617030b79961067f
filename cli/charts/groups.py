"""Groups of a step: a bar for every group, micro-batch after micro-batch, against the bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from cli.charts.picture import FAINT, GRID, MARGIN, PALETTE, QUIET, shortened, style

if TYPE_CHECKING:
    from collections.abc import Mapping


def figure(document: Mapping[str, Any], *, title: str, subtitle: str) -> go.Figure:
    """Seconds of every group by its number of ranks; a dashed line at each proven bound."""
    fig = go.Figure()
    batches = document["micro_batches"]
    every = [(b, i, g) for b, batch in enumerate(batches) for i, g in enumerate(batch["groups"])]
    places = {(b, i): place + b for place, (b, i, _) in enumerate(every)}
    degrees = sorted({group["degree"] for _, _, group in every}, reverse=True)
    for k, degree in enumerate(degrees):
        here = [(places[b, i], g) for b, i, g in every if g["degree"] == degree]
        fig.add_trace(
            go.Bar(
                x=[place for place, _ in here], y=[g["seconds"] for _, g in here],
                name=f"{degree} rank{'s' if degree > 1 else ''}",
                marker={"color": PALETTE[k % len(PALETTE)]},
                customdata=[[g["num_tokens"], len(g["sequences"]), g["longest"]] for _, g in here],
                hovertemplate="%{y:.4g} s: %{customdata[1]} sequences, %{customdata[0]:,} tokens, "
                "the longest %{customdata[2]:,}<extra></extra>",
            )
        )  # fmt: skip
    for b, batch in enumerate(batches):
        last = len(batch["groups"]) - 1
        fig.add_shape(
            type="line", x0=places[b, 0] - 0.5, x1=places[b, last] + 0.5,
            y0=batch["lower_s"], y1=batch["lower_s"], line={"color": QUIET, "dash": "dash"},
        )  # fmt: skip
    style(
        fig, title=shortened(title, 84), subtitle=subtitle,
        footnote="Bars: seconds of each group, one micro-batch after the other. Dashed: no "
        "grouping of that micro-batch ends sooner (proven).",
    )  # fmt: skip
    axis = {"gridcolor": GRID, "linecolor": FAINT, "zeroline": False, "tickfont": {"color": QUIET}}
    fig.update_layout(
        xaxis={**axis, "title": {"text": "groups"}, "showticklabels": False, "showgrid": False},
        yaxis={**axis, "title": {"text": "seconds"}, "rangemode": "tozero"},
        margin={**MARGIN, "t": 118},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"},
    )
    return fig

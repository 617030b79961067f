"""A simulated step as a slide: every stage's passes over time, and the memory they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import plotly.graph_objects as go

from cli.charts.picture import FAINT, GRID, INK, MARGIN, PALETTE, QUIET, shortened, style
from cli.quantity import percent_text, scaled_text
from cli.simulated import Simulated, step_text
from hwmodels.units import GIB
from simulator.schedule import BACKWARD, BOTH, FORWARD, INPUT_GRAD, WEIGHT_GRAD
from simulator.timeline import GATHER, REDUCE, UPDATE, StepTimeline

LABELS: Final = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT_GRAD: "inputs' gradients",
    WEIGHT_GRAD: "weights' gradients",
    BOTH: "forward and backward",
    GATHER: "weights gathered",
    REDUCE: "gradients reduced",
    UPDATE: "optimizer",
}
COLORS: Final = {
    FORWARD: PALETTE[0],
    BACKWARD: PALETTE[2],
    INPUT_GRAD: PALETTE[2],
    WEIGHT_GRAD: PALETTE[5],
    BOTH: PALETTE[6],
    GATHER: PALETTE[4],
    REDUCE: PALETTE[1],
    UPDATE: PALETTE[3],
}
MOST_SPANS: Final = 12_000
"""Bars that a browser draws without effort; a longer step is shown up to there."""
FEW_SPANS: Final = 600
"""So few that a white edge between them hides none."""
UPPER, LOWER = (0.44, 1.0), (0.0, 0.33)
MILLI: Final = 1e3


def figure(s: Simulated) -> go.Figure:
    """Passes of the stages above, live bytes of first, last and fullest stage below."""
    fig = go.Figure()
    spans = _spans(s.found)
    shown = spans[:MOST_SPANS]
    last_s = max(end for _, _, _, end in shown)
    unit, name = (1.0, "s") if s.found.seconds >= 1 else (MILLI, "ms")
    _draw_spans(fig, shown, unit)
    _draw_memory(fig, s, unit)
    cut = f"; the first {len(shown):,} of {len(spans):,} spans" if len(spans) > len(shown) else ""
    rate = scaled_text(float(s.question.num_tokens / s.found.seconds), "tokens/s")
    style(
        fig,
        title=shortened(s.heading(), 84),
        subtitle=f"{s.plan_text}: {step_text(s)}, {rate}, MFU {percent_text(s.mfu_frac)}, "
        f"stages idle {percent_text(s.found.bubble_frac())}",
        footnote=shortened(f"{s.stack_name}: {s.source}{cut}.", 170),
    )
    _axes(fig, s, last_s * unit, name)
    return fig


def _spans(found: StepTimeline) -> list[tuple[str, int, float, float]]:
    """(kind, stage, start, end) in the order of their starts; exchange beside the passes too."""
    line = found.timeline
    starts, ends = line.start_s, line.end_s
    spans = [(p.kind, p.stage, float(starts[p.first]), float(ends[p.last])) for p in found.passes]
    for i, task in enumerate(line.tasks):
        if task.kind in (GATHER, REDUCE, UPDATE) and task.seconds > 0:
            stage = int(task.stream.rpartition(" ")[2])
            spans.append((task.kind, stage, float(starts[i]), float(ends[i])))
    return sorted(spans, key=lambda span: (span[2], span[1]))


def _draw_spans(
    fig: go.Figure, spans: Sequence[tuple[str, int, float, float]], unit: float
) -> None:
    """Passes as thick bars; exchange as thin ones under their stage."""
    edge = 0.6 if len(spans) < FEW_SPANS else 0.0
    for kind, color in COLORS.items():
        own = [span for span in spans if span[0] == kind]
        if not own:
            continue
        thin = kind in (GATHER, REDUCE)
        fig.add_bar(
            orientation="h",
            base=[start * unit for _, _, start, _ in own],
            x=[(end - start) * unit for _, _, start, end in own],
            y=[stage + (0.42 if thin else 0.0) for _, stage, _, _ in own],
            width=0.14 if thin else 0.66,
            marker={"color": color, "line": {"color": "white", "width": edge}},
            name=LABELS[kind],
            hovertemplate=f"{LABELS[kind]}<br>stage %{{y:.0f}}, %{{x:.4g}}<extra></extra>",
        )


def _draw_memory(fig: go.Figure, s: Simulated, unit: float) -> None:
    for own, color in zip(s.stages, (INK, PALETTE[1], PALETTE[4]), strict=False):
        fig.add_scatter(
            x=own.when_s * unit,
            y=own.live_bytes / GIB,
            mode="lines",
            line={"shape": "hv", "color": color, "width": 1.8},
            name=f"memory of stage {own.stage}",
            xaxis="x2",
            yaxis="y2",
        )
    capacity = s.cluster.device.hbm.capacity_bytes / GIB
    fig.add_shape(
        type="line", xref="x2 domain", x0=0, x1=1, yref="y2", y0=capacity, y1=capacity,
        line={"color": PALETTE[1], "dash": "dash", "width": 1.4},
    )  # fmt: skip
    fig.add_annotation(
        text=f"{capacity:.0f} GiB", xref="x2 domain", x=1, yref="y2", y=capacity, showarrow=False,
        xanchor="right", yanchor="bottom", font={"size": 12, "color": PALETTE[1]},
    )  # fmt: skip


def _axes(fig: go.Figure, s: Simulated, last: float, unit_name: str) -> None:
    stages = s.found.schedule.num_stages
    every = max(1, -(-stages // 16))
    peak = max(m.peak_bytes for m in s.stages) / GIB
    room = max(peak, s.cluster.device.hbm.capacity_bytes / GIB)
    common: dict[str, Any] = {
        "gridcolor": GRID, "linecolor": FAINT, "tickfont": {"size": 12, "color": QUIET},
        "zeroline": False,
    }  # fmt: skip
    fig.update_layout(
        barmode="overlay",
        margin={**MARGIN, "t": 118},
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "font": {"size": 12}},
        xaxis={**common, "range": [0, last], "anchor": "y", "ticksuffix": f" {unit_name}"},
        yaxis={
            **common, "domain": UPPER, "autorange": False, "range": [stages - 0.3, -0.6],
            "tickvals": list(range(0, stages, every)),
            "ticktext": [f"stage {i}" for i in range(0, stages, every)], "showgrid": False,
        },
        xaxis2={**common, "range": [0, last], "anchor": "y2", "matches": "x",
                "ticksuffix": f" {unit_name}"},
        yaxis2={**common, "domain": LOWER, "range": [0, 1.12 * room], "title": {
            "text": "live memory, GiB", "font": {"size": 13, "color": QUIET}}},
    )  # fmt: skip

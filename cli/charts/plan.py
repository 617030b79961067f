"""A plan search as a slide: where the time goes, what fills memory, and every plan that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import plotly.graph_objects as go

from cli.charts.picture import FAINT, FONT, GRID, INK, PALETTE, QUIET, WIDTH, shortened, style
from cli.commands.plan import GIB, RUNG, asked_text, short_plan
from cli.quantity import percent_text, scaled_text, seconds_text

if TYPE_CHECKING:
    from simulator.planners.parallelism import Candidate, PlanChoice, Step

# Bars of the time panel: label -> the pieces it adds up; whatever is not named is 'other kernels'.
TIME_GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "attention": ("attention",),
    "MLP and experts": ("mlp", "moe"),
    "other kernels": (),
    "recompute": ("recompute",),
    "communication": (
        "tensor parallel", "context parallel", "expert parallel", "data parallel",
        "pipeline sends",
    ),
    "pipeline bubble": ("pipeline bubble",),
    "optimizer": ("optimizer",),
}  # fmt: skip
MEMORY_GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "weights": ("weights", "gathered weights"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "activations": ("activations", "working set"),
    "KV cache": ("kv cache",),
    "ends and loss": (),
}
MOST_POINTS: Final = 4000
SLOWEST: Final = 20
"""Plans that take this many times the best one's step are off the picture."""
LEFT, EDGE = 196, 26
BARS, DOTS = (0.0, 0.50), (0.60, 1.0)
UPPER, LOWER = (0.58, 0.93), (0.0, 0.36)


def figure(choice: PlanChoice, question: Step) -> go.Figure:
    """Bars of the shown plans at the left, the whole search at the right."""
    fig = go.Figure()
    shown = (choice.best, *choice.runners_up)
    labels = [short_plan(c) for c in shown]
    times = [_grouped(c.step.seconds_by_piece, TIME_GROUPS, "other kernels") for c in shown]
    sizes = [_grouped(c.memory.bytes_by_part, MEMORY_GROUPS, "ends and loss") for c in shown]
    _bars(fig, labels, times, 1.0, "x", "y", "legend", seconds_text)
    _bars(fig, labels, sizes, GIB, "x2", "y2", "legend2", lambda v: f"{v / GIB:.2f} GiB")
    _search(fig, choice, shown)
    _axes(fig, choice, labels, times)
    system = choice.cluster
    best = choice.best.step
    headline = (
        f"{choice.plan}: {seconds_text(float(best.seconds))} a step, "
        f"{scaled_text(float(best.tokens_per_s), 'tokens/s')}, "
        f"MFU {percent_text(float(best.mfu_frac))} at most"
    )
    style(
        fig,
        title=shortened(
            f"{asked_text(question)} on {system.num_accelerators} x {system.device.id}", 84
        ),
        subtitle=headline,
        footnote=f"Rung {RUNG}.<br>{choice.num_feasible:,} of {choice.num_evaluated:,} plans fit "
        f"{choice.budget_bytes / GIB:.1f} GiB per accelerator; all were evaluated (gap 0).",
    )
    fig.update_layout(
        barmode="stack", margin={"l": LEFT, "r": 36, "t": 96, "b": 98}, title_x=EDGE / WIDTH
    )
    fig.update_annotations(selector={"y": 0, "x": 0}, xshift=EDGE - LEFT)
    return fig


def _grouped(
    values: Mapping[str, object], groups: Mapping[str, tuple[str, ...]], rest: str
) -> dict[str, float]:
    group_of = {name: label for label, names in groups.items() for name in names}
    sums = dict.fromkeys(groups, 0.0)
    for name, value in values.items():
        sums[group_of.get(name, rest)] += float(value)  # type: ignore[arg-type]
    return sums


def _bars(fig, labels, rows, unit, x, y, legend, text) -> None:  # type: ignore[no-untyped-def]
    """One stacked horizontal bar per plan; groups that are nothing everywhere are left out."""
    colors = iter(PALETTE)
    largest = max(sum(row.values()) for row in rows)
    for group in rows[0]:
        color = next(colors)
        values = [row[group] for row in rows]
        if max(values) < 1e-3 * largest:
            continue
        fig.add_trace(
            go.Bar(
                x=[v / unit for v in values],
                y=labels,
                name=group,
                orientation="h",
                marker={"color": color, "line": {"color": "white", "width": 1}},
                xaxis=x,
                yaxis=y,
                legend=legend,
                width=0.62,
                hovertemplate="%{y}<br>" + group + ": %{customdata}<extra></extra>",
                customdata=[text(v) for v in values],
            )
        )


def _search(fig: go.Figure, choice: PlanChoice, shown: tuple[Candidate, ...]) -> None:
    """Every plan that fits, thinned evenly where there are too many to see."""
    step = max(1, choice.num_feasible // MOST_POINTS)
    fig.add_trace(
        go.Scattergl(
            x=choice.total_bytes[::step] / GIB,
            y=choice.seconds[::step],
            mode="markers",
            marker={"color": FAINT, "size": 5, "opacity": 0.45},
            xaxis="x3",
            yaxis="y3",
            showlegend=False,
            customdata=[str(choice.feasible.at(i)) for i in range(0, choice.num_feasible, step)],
            hovertemplate="%{customdata}<br>%{x:.1f} GiB, %{y:.4g} s<extra></extra>",
        )
    )
    ordered = shown[::-1]  # the best on top
    fig.add_trace(
        go.Scatter(
            x=[float(c.memory.total) / GIB for c in ordered],
            y=[float(c.step.seconds) for c in ordered],
            mode="markers",
            marker={
                "color": [INK] * (len(shown) - 1) + [PALETTE[1]],
                "size": [10] * (len(shown) - 1) + [20],
                "symbol": ["circle-open"] * (len(shown) - 1) + ["star"],
                "line": {"width": 1.5, "color": [INK] * (len(shown) - 1) + ["white"]},
            },
            xaxis="x3",
            yaxis="y3",
            showlegend=False,
            customdata=[short_plan(c) for c in ordered],
            hovertemplate="%{customdata}<br>%{x:.1f} GiB, %{y:.4g} s<extra></extra>",
        )
    )
    fig.add_annotation(
        x=float(shown[0].memory.total) / GIB,
        y=np.log10(float(shown[0].step.seconds)),
        xref="x3",
        yref="y3",
        text="<b>best</b>",
        showarrow=False,
        yshift=-17,
        font={"size": 13, "color": PALETTE[1]},
    )


def _axes(
    fig: go.Figure, choice: PlanChoice, labels: list[str], times: list[dict[str, float]]
) -> None:
    quiet = {"tickfont": {"size": 12, "color": QUIET}, "gridcolor": GRID, "zeroline": False}

    def named(text: str) -> dict[str, object]:
        return {"text": text, "font": {"size": 13, "color": QUIET}, "standoff": 6}

    plans = {"autorange": "reversed", "tickfont": {"size": 12, "family": FONT}, "ticks": ""}
    longest = max(sum(row.values()) for row in times)
    budget = choice.budget_bytes / GIB
    fig.update_layout(
        xaxis={"domain": BARS, "anchor": "y", "title": named("seconds per step"),
               "range": [0, longest * 1.04], **quiet},
        yaxis={"domain": UPPER, "anchor": "x", "categoryarray": labels, **plans},
        xaxis2={"domain": BARS, "anchor": "y2", "title": named("GiB per accelerator"),
                "range": [0, budget * 1.06], **quiet},
        yaxis2={"domain": LOWER, "anchor": "x2", "categoryarray": labels, **plans},
        xaxis3={"domain": DOTS, "anchor": "y3", "title": named("GiB per accelerator"),
                "range": [0, budget * 1.06], **quiet},
        yaxis3={"domain": (LOWER[0], UPPER[1]), "anchor": "x3", "type": "log",
                "title": named("seconds per step"), **_log_ticks(choice.seconds), **quiet},
        legend=_legend_at(UPPER[1]),
        legend2=_legend_at(LOWER[1]),
    )  # fmt: skip
    for x, y in (("x2", "y2 domain"), ("x3", "y3 domain")):
        fig.add_shape(
            type="line", x0=budget, x1=budget, y0=0, y1=1, xref=x, yref=y,
            line={"color": INK, "width": 1.5, "dash": "dot"},
        )  # fmt: skip
    fig.add_annotation(
        x=budget, y=1, xref="x3", yref="y3 domain", text="budget", showarrow=False,
        xanchor="right", xshift=-5, yanchor="top", font={"size": 12, "color": QUIET},
    )  # fmt: skip
    fig.add_annotation(
        text=f"<b>Every plan that fits</b>, up to {SLOWEST} times the best", x=DOTS[0], y=UPPER[1], xref="paper", yref="paper",
        showarrow=False, xanchor="left", yanchor="bottom", yshift=8,
        font={"size": 14, "color": INK},
    )  # fmt: skip


def _log_ticks(seconds: Sequence[float]) -> dict[str, object]:
    """About eight round numbers from below the best plan to SLOWEST times as long."""
    best = float(np.min(seconds))
    high = min(float(np.max(seconds)), SLOWEST * best) * 1.08
    low = best / (high / best) ** 0.12
    steps = [1, 1.5, 2, 3, 4, 5, 6, 8] if high / low < 30 else [1, 2, 5]
    steps = steps if high / low > 1.5 else [i / 10 for i in range(10, 100)]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
    ticks = ticks[:: max(1, len(ticks) // 8)]
    return {
        "range": [np.log10(low), np.log10(high)],
        "tickvals": ticks,
        "ticktext": [seconds_text(t) for t in ticks],
    }


def _legend_at(height: float) -> dict[str, object]:
    return {
        "orientation": "h",
        "x": BARS[0],
        "y": height + 0.01,
        "xanchor": "left",
        "yanchor": "bottom",
        "font": {"size": 12, "color": INK},
        "traceorder": "normal",
        "itemwidth": 30,
    }

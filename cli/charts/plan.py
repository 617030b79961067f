"""A plan search as a slide: where the time goes, what fills memory, and every plan that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cli.charts.picture import (
    FAINT,
    GRID,
    INK,
    MARGIN,
    PALETTE,
    QUIET,
    WIDTH,
    seconds_tick,
    shortened,
    style,
    text_width,
)
from cli.plans import asked_text, rung_text, short_plan, step_text
from cli.quantity import digits, percent_text, scaled_text, seconds_text
from hwmodels.units import GIB

if TYPE_CHECKING:
    from hwmodels.step_ratios import StepRatio
    from simulator.planners.parallelism import Candidate, PlanChoice, Step
    from workloads.numeric import Num

# Colours of the time panel: label -> the pieces it adds up; 'other' has what nobody names.
TIME_GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "attention": ("attention",),
    "MLP, experts": ("mlp", "moe"),
    "other kernels": (),
    "recompute": ("recompute",),
    "communication": (
        "tensor parallel", "context parallel", "expert parallel", "data parallel",
        "pipeline sends",
    ),
    "bubble": ("pipeline bubble",),
    "optimizer": ("optimizer",),
}  # fmt: skip
MEMORY_GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "weights": ("weights", "gathered weights"),
    "gradients": ("gradients", "layer gradients"),
    "optimizer": ("optimizer",),
    "activations": ("activations", "working set"),
    "KV cache": ("kv cache",),
    "embedding, loss": (),
}
Floats: TypeAlias = Sequence[float] | NDArray[np.float64]

MOST_BARS: Final = 5
MOST_POINTS: Final = 2500
SLOWEST: Final = 20
"""Plans that take this many times the best one's step are off the picture."""
LEFT, RIGHT, EDGE = 190, 36, 30
BARS, DOTS = (0.0, 0.53), (0.65, 1.0)
UPPER, LOWER = (0.56, 0.91), (0.0, 0.35)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bars:
    """One panel of stacked bars: a row of groups per plan, and a total beside each bar."""

    number: int
    heading: str
    rows: Sequence[Mapping[str, float]]
    unit: float
    text: Callable[[float], str]
    domain: tuple[float, float]
    most: float
    totals_at: float | None = None

    @property
    def x(self) -> str:
        """Name of the panel's x axis."""
        return "x" if self.number == 1 else f"x{self.number}"

    @property
    def y(self) -> str:
        """Name of the panel's y axis."""
        return "y" if self.number == 1 else f"y{self.number}"

    @property
    def colors(self) -> dict[str, str]:
        """The groups that can be seen in some bar, each with its colour."""
        seen = 2e-3 * max(sum(row.values()) for row in self.rows)
        named = zip(self.rows[0], PALETTE, strict=False)
        return {g: c for g, c in named if max(row[g] for row in self.rows) >= seen}


def figure(choice: PlanChoice, question: Step, ratio: StepRatio | None = None) -> go.Figure:
    """Bars of the shown plans at the left, the whole search at the right."""
    fig = go.Figure()
    shown = (choice.best, *choice.runners_up)[:MOST_BARS]
    labels = [_two_lines(c) for c in shown]
    for panel in (_time_panel(shown), _memory_panel(shown, choice.budget_bytes)):
        _draw_bars(fig, panel, labels)
    _draw_search(fig, choice, shown)
    _budget_lines(fig, choice.budget_bytes / GIB)
    best, system = choice.best.step, choice.cluster
    speed = scaled_text(float(best.tokens_per_s), "tokens/s")
    style(
        fig,
        title=shortened(
            f"{asked_text(question)} on {system.num_accelerators} x {system.device.id}", 84
        ),
        subtitle=f"{choice.plan}: {seconds_text(float(best.seconds))} {step_text(question)}, "
        f"{speed}, MFU {percent_text(float(best.mfu_frac))}",
        footnote=_footnote(choice, ratio),
    )
    fig.update_layout(
        barmode="stack",
        showlegend=False,
        margin={**MARGIN, "l": LEFT, "r": RIGHT},
        title_x=EDGE / WIDTH,
    )
    fig.update_annotations(selector={"name": "footnote"}, xshift=EDGE - LEFT)
    return fig


def _footnote(choice: PlanChoice, ratio: StepRatio | None) -> str:
    published = "" if ratio is None else (
        f"; published steps of dense models on this {ratio.scope} took {digits(ratio.p10)} to "
        f"{digits(ratio.p90)} times this bound"
    )  # fmt: skip
    return (
        f"Rung {rung_text(choice)}{published}.<br>"
        f"{choice.num_feasible:,} of {choice.num_evaluated:,} plans fit "
        f"{choice.budget_bytes / GIB:.1f} GiB per accelerator; all were evaluated, so none "
        "is faster."
    )


def _two_lines(candidate: Candidate) -> str:
    """The mesh, and under it the schedule in grey."""
    mesh, _, schedule = short_plan(candidate).partition(" mb")
    return f"{mesh}<br><span style='color:{QUIET};font-size:11px'>mb{schedule}</span>"


def _time_panel(shown: Sequence[Candidate]) -> _Bars:
    rows = [_grouped(c.step.seconds_by_piece, TIME_GROUPS, "other kernels") for c in shown]
    longest = max(sum(row.values()) for row in rows)
    unit, name = next(
        (u for u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if longest >= 2 * u[0]), (1e-9, "ns")
    )
    return _Bars(
        number=1,
        heading=f"Time ({name})",
        rows=rows,
        unit=unit,
        text=seconds_text,
        domain=UPPER,
        most=longest / unit * 1.14,
    )


def _memory_panel(shown: Sequence[Candidate], budget_bytes: float) -> _Bars:
    return _Bars(
        number=2,
        heading="Memory per accelerator (GiB)",
        rows=[_grouped(c.memory.bytes_by_part, MEMORY_GROUPS, "embedding, loss") for c in shown],
        unit=GIB,
        text=lambda v: f"{v / GIB:.1f} GiB",
        domain=LOWER,
        most=budget_bytes / GIB * 1.14,
        totals_at=budget_bytes / GIB,  # beyond the line, which they would cross
    )


def _grouped(
    values: Mapping[str, Num], groups: Mapping[str, tuple[str, ...]], rest: str
) -> dict[str, float]:
    group_of = {name: label for label, names in groups.items() for name in names}
    sums = dict.fromkeys(groups, 0.0)
    for name, value in values.items():
        sums[group_of.get(name, rest)] += float(value)
    return sums


def _draw_bars(fig: go.Figure, panel: _Bars, labels: Sequence[str]) -> None:
    """One stacked horizontal bar per plan, the best on top."""
    places = list(range(len(labels)))
    for group, color in panel.colors.items():
        values = [row[group] for row in panel.rows]
        fig.add_trace(
            go.Bar(
                x=[v / panel.unit for v in values],
                y=places,
                name=group,
                orientation="h",
                marker={"color": color, "line": {"color": "white", "width": 1}},
                xaxis=panel.x,
                yaxis=panel.y,
                width=0.62,
                hovertemplate=group + ": %{customdata}<extra></extra>",
                customdata=[panel.text(v) for v in values],
            )
        )
    for place, row in zip(places, panel.rows, strict=True):
        total = sum(row.values())
        at = total / panel.unit if panel.totals_at is None else panel.totals_at
        fig.add_annotation(
            x=at, y=place, xref=panel.x, yref=panel.y, text=panel.text(total).removesuffix(" GiB"),
            showarrow=False, xanchor="left", xshift=5, font={"size": 12, "color": INK},
        )  # fmt: skip
    # Boxes rather than a legend: plotly's would run into the panel beside it.
    boxes = [
        f"<span style='font-size:16px;color:{c}'>■</span> {g}" for g, c in panel.colors.items()
    ]
    _heading(fig, BARS[0], EDGE - LEFT, panel.heading, "   ".join(boxes), panel.domain[1])
    number = "" if panel.number == 1 else str(panel.number)
    fig.update_layout({
        f"xaxis{number}": {
            "domain": BARS, "anchor": panel.y, "range": [0, panel.most], **_quiet(),
        },
        f"yaxis{number}": {
            "domain": panel.domain, "anchor": panel.x, "range": [max(len(labels), 3) - 0.5, -0.5],
            "tickvals": places, "ticktext": list(labels), "ticks": "", "showgrid": False,
            "zeroline": False, "tickfont": {"size": 12, "color": INK}, "ticklabelstandoff": 6,
        },
    })  # fmt: skip


def _heading(fig: go.Figure, x: float, shift: float, heading: str, beneath: str, y: float) -> None:
    """What a panel shows, and a line beneath."""
    for text, size, lift in ((f"<b>{heading}</b>", 14, 25), (beneath, 12, 4)):
        fig.add_annotation(
            text=text, x=x, y=y, xref="paper", yref="paper", showarrow=False,
            xanchor="left", yanchor="bottom", xshift=shift, yshift=lift,
            font={"size": size, "color": INK},
        )  # fmt: skip


def _draw_search(fig: go.Figure, choice: PlanChoice, shown: Sequence[Candidate]) -> None:
    """Every plan that fits, thinned evenly where there are too many to see; the bars' on top."""
    step = -(-choice.num_feasible // MOST_POINTS)
    _dots(
        fig, choice.total_bytes[::step], choice.seconds[::step],
        [str(choice.feasible.at(i)) for i in range(0, choice.num_feasible, step)],
        {"color": FAINT, "size": 5, "opacity": 0.45},
    )  # fmt: skip
    others, best = shown[1:], shown[:1]
    for group, marker in (
        (others, {"color": INK, "size": 10, "symbol": "circle-open", "line": {"width": 1.5}}),
        (best, {"color": PALETTE[1], "size": 20, "symbol": "star",
                "line": {"width": 1.5, "color": "white"}}),
    ):  # fmt: skip
        bytes_, seconds = ([float(v) for v in found] for found in (
            (c.memory.total for c in group), (c.step.seconds for c in group)
        ))  # fmt: skip
        _dots(fig, bytes_, seconds, [short_plan(c) for c in group], marker)
    fig.add_annotation(
        x=float(shown[0].memory.total) / GIB, y=np.log10(float(shown[0].step.seconds)),
        xref="x3", yref="y3", text="<b>best</b>", showarrow=False, yshift=-18,
        font={"size": 13, "color": PALETTE[1]},
    )  # fmt: skip
    circled = "circled: those at the left" if others else ""
    _heading(fig, DOTS[0], 0, "Every plan that fits", circled, UPPER[1])
    named = {"font": {"size": 13, "color": QUIET}, "standoff": 8}
    fig.update_layout(
        xaxis3={"domain": DOTS, "anchor": "y3", "range": [0, choice.budget_bytes / GIB * 1.04],
                "title": {"text": "memory per accelerator (GiB)", **named}, **_quiet()},
        yaxis3={"domain": (LOWER[0], UPPER[1]), "anchor": "x3", "type": "log",
                **_time_range(choice.seconds), **_quiet()},
    )  # fmt: skip


def _dots(
    fig: go.Figure,
    sizes_bytes: Floats,
    seconds: Floats,
    names: Sequence[str],
    marker: Mapping[str, object],
) -> None:
    fig.add_trace(
        go.Scatter(
            x=np.asarray(sizes_bytes) / GIB,
            y=seconds,
            mode="markers",
            marker=marker,
            cliponaxis=False if marker.get("symbol") == "star" else None,
            xaxis="x3",
            yaxis="y3",
            customdata=[[n, seconds_text(float(s))] for n, s in zip(names, seconds, strict=True)],
            hovertemplate="%{customdata[0]}<br>%{x:.1f} GiB, %{customdata[1]}<extra></extra>",
        )
    )


def _budget_lines(fig: go.Figure, budget: float) -> None:
    for x, y in (("x2", "y2 domain"), ("x3", "y3 domain")):
        fig.add_shape(
            type="line", x0=budget, x1=budget, y0=0, y1=1, xref=x, yref=y,
            line={"color": INK, "width": 1.5, "dash": "dot"},
        )  # fmt: skip
        fig.add_annotation(
            x=budget, y=1, xref=x, yref=y, text=f"budget {budget:.1f}", showarrow=False,
            xanchor="right", xshift=text_width("budget", 12) / 2, yanchor="bottom", yshift=1,
            font={"size": 12, "color": QUIET},
        )  # fmt: skip


def _quiet() -> dict[str, object]:
    return {
        "tickfont": {"size": 12, "color": QUIET},
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": FAINT,
    }


def _time_range(seconds: Floats) -> dict[str, object]:
    """From below the best plan to SLOWEST times as long, with a handful of round numbers."""
    best = float(np.min(seconds))
    high = max(min(float(np.max(seconds)), SLOWEST * best) * 1.08, 1.2 * best)
    low = best / (high / best) ** 0.12
    ticks = _even_ticks(low, high) if high / low < 4 else _decade_ticks(low, high)
    return {
        "range": [np.log10(low), np.log10(high)],
        "tickvals": ticks,
        "ticktext": [seconds_tick(t) for t in ticks],
    }


def _even_ticks(low: float, high: float) -> list[float]:
    """Multiples of a round step, four to nine of them."""
    least = (high - low) / 8
    decade = 10.0 ** np.floor(np.log10(least))
    step = next(s * decade for s in (1, 2, 5, 10) if s * decade >= least)
    return [i * step for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _decade_ticks(low: float, high: float) -> list[float]:
    """Round numbers that lie about evenly on a logarithmic axis."""
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low < 30 else (1, 2, 5)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]

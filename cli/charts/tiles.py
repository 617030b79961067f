"""What shared memory is worth to a kernel: the staircase of its best times."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from cli.charts.picture import FAINT, PALETTE, seconds_tick, style
from cli.quantity import seconds_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from simulator.planners.tiles import TilePlan

KIB: Final = 1024


def figure(plan: TilePlan) -> go.Figure:
    """The curve over the shared memory of a block, and where the device stands."""
    import plotly.graph_objects as go

    from simulator.planners.tiles import HEADROOM_BYTES

    has = plan.chip.block_smem_bytes
    x = [(has + point.more_smem_bytes) / KIB for point in plan.curve]
    y = [point.seconds for point in plan.curve]
    x, y = [*x, (has + HEADROOM_BYTES) / KIB], [*y, y[-1]]
    words = [", ".join(f"{k} {v}" for k, v in p.values.items()) for p in plan.curve]
    fig = go.Figure(
        go.Scatter(
            x=x, y=y, mode="lines+markers", line={"shape": "hv", "color": PALETTE[0]},
            text=[*words, words[-1]], hovertemplate="%{x:.1f} KiB: %{y:.4s}s<br>%{text}",
        )
    )  # fmt: skip
    fig.add_vline(x=has / KIB, line={"color": FAINT, "dash": "dot"})
    fig.update_xaxes(title="shared memory a block may take (KiB; the SM's moves with it)")
    ticks = _ticks(min(y), max(y))
    fig.update_yaxes(
        title="time of the best kernel", type="log", tickvals=ticks,
        ticktext=[seconds_tick(t) for t in ticks],
    )  # fmt: skip
    style(
        fig, title=f"{plan.op.name} on {plan.chip.device.name}",
        subtitle=f"best {seconds_text(plan.best.seconds)} of {plan.num_kernels:,} kernels, proven "
        "by exhaustion; dotted: what the device has",
        footnote=plan.source,
    )  # fmt: skip
    return fig


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every power of ten from one below `low` to one above `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5)]

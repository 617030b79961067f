"""What shared memory is worth to a kernel: the staircase of its best times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cli.charts.picture import FAINT, PALETTE, style
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
    y = [point.seconds * 1e6 for point in plan.curve]
    x, y = [*x, (has + HEADROOM_BYTES) / KIB], [*y, y[-1]]
    words = [", ".join(f"{k} {v}" for k, v in p.values.items()) for p in plan.curve]
    fig = go.Figure(
        go.Scatter(
            x=x, y=y, mode="lines+markers", line={"shape": "hv", "color": PALETTE[0]},
            text=[*words, words[-1]], hovertemplate="%{x:.1f} KiB: %{y:.1f} us<br>%{text}",
        )
    )  # fmt: skip
    fig.add_vline(x=has / KIB, line={"color": FAINT, "dash": "dot"})
    fig.update_xaxes(title="shared memory a block may take (KiB; the SM's moves with it)")
    fig.update_yaxes(title="microseconds of the best kernel", type="log")
    style(
        fig, title=f"{plan.op.name} on {plan.chip.device.name}",
        subtitle=f"best {seconds_text(plan.best.seconds)} of {plan.num_kernels:,} kernels, proven "
        "by exhaustion; dotted: what the device has",
        footnote=plan.source,
    )  # fmt: skip
    return fig

"""A simulated step as a record and in words: what `simulate` prints, writes and draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli import show
from cli.plans import BOUND, asked_text
from cli.quantity import percent_text, scaled_text, seconds_text
from cli.stages import counts_text
from hwmodels.units import GIB

if TYPE_CHECKING:
    from rich.table import Table

    from hwmodels.cluster import Cluster
    from simulator.pieces import StepEstimate
    from simulator.recipe import Recipe
    from simulator.stack import OnDevice
    from simulator.step_memory import StageMemory
    from simulator.timeline import StepTimeline
    from workloads.models.transformer import TrainStep

SMALL_FRAC = 0.005
"""Pieces below this share of the step are told together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """One answer: the question, the timeline, the sum of pieces it is told with, and memory.

    `half_80`: half width, in log time, of the interval that held 80 % of the published steps whose
    tables the fit had not seen; None on the bound rung. `stages` are those shown,
    `counts` the layers of every stage where they were asked for.
    """

    question: TrainStep
    cluster: Cluster
    recipe: Recipe
    framework: OnDevice | None
    half_80: float | None
    found: StepTimeline
    analytic: StepEstimate
    stages: Sequence[StageMemory]
    counts: Sequence[int] = ()

    @property
    def fullest(self) -> StageMemory:
        """Of the stages shown, the one whose peak is highest."""
        from simulator.step_memory import fullest

        return fullest(self.stages)

    @property
    def interval_s(self) -> tuple[float, float] | None:
        """Where 80 % of steps like this one lie."""
        if self.half_80 is None:
            return None
        wide = math.exp(self.half_80)
        return self.found.seconds / wide, self.found.seconds * wide

    @property
    def mfu_frac(self) -> float:
        """Model flops over what all ranks could do in that time."""
        peak = self.analytic.peak_flops_per_s * float(self.found.plan.num_ranks)
        return float(self.question.model_flops) / (self.found.seconds * peak)

    @property
    def plan_text(self) -> str:
        """The plan, with the layers of its stages where they were asked for."""
        plan = str(self.found.plan)
        return f"{plan}, stages of {counts_text(self.counts)} layers" if self.counts else plan

    @property
    def stack_name(self) -> str:
        """The framework, or the bound."""
        return self.framework.stack.name if self.framework else BOUND

    @property
    def source(self) -> str:
        """What the times rest on."""
        return self.framework.source if self.framework else "kernels at their roofline"

    def heading(self) -> str:
        """The question, the hardware and the number format in a line."""
        return (
            f"{asked_text(self.question)} on {self.cluster.num_accelerators} x "
            f"{self.cluster.device.id}, {self.recipe.name}"
        )


def record(s: Simulated) -> dict[str, Any]:
    """The whole answer."""
    from workloads.axis_order import AxisOrder

    low, high = s.interval_s or (None, None)
    full = s.fullest
    return {
        "model": s.question.config.name,
        "cluster": s.cluster.id,
        "num_accelerators": s.cluster.num_accelerators,
        "plan": s.found.plan,
        "order": AxisOrder(int(s.found.plan.order)).label,
        "schedule": s.found.schedule.name,
        "stage_layers": s.found.stage_layers,
        "stack": s.stack_name,
        "recipe": s.recipe.name,
        "rung": s.analytic.rung,
        "source": s.source,
        "seconds": s.found.seconds,
        "seconds_low_80": low,
        "seconds_high_80": high,
        "tokens_per_s": s.question.num_tokens / s.found.seconds,
        "mfu_frac": s.mfu_frac,
        "bubble_frac": s.found.bubble_frac(),
        "exposed_s": s.found.exposed_s(),
        "critical_s": dict(s.found.critical_s()),
        "seconds_by_piece": s.analytic.seconds_by_piece,
        "analytic_s": s.analytic.seconds,
        "layer": s.found.layers,
        "memory": {
            "stage": full.stage,
            "peak_bytes": full.peak_bytes,
            "capacity_bytes": s.cluster.device.hbm.capacity_bytes,
            "alive_at_peak": [
                {"kind": a.kind, "bytes": a.num_bytes, "num_tensors": a.num_tensors}
                for a in full.memory.alive_at_peak()
            ],
        },
        "num_tasks": len(s.found.timeline.tasks),
    }


def print_screen(s: Simulated) -> None:
    """Facts, then what the step is made of, then what fills the memory at its peak."""
    out = show.console()
    out.print(s.heading(), style="bold")
    out.print(show.pairs(_facts(s)))
    out.print(_pieces_table(s.analytic.seconds_by_piece))
    out.print(_memory_table(s))


def step_text(s: Simulated) -> str:
    """The step with its interval."""
    text = seconds_text(s.found.seconds)
    if s.interval_s is None:
        return f"{text} at least" if s.framework is None else text
    low, high = (seconds_text(t) for t in s.interval_s)
    return f"{text} (80 %: {low} to {high})"


def _facts(s: Simulated) -> list[tuple[str, str]]:
    found = s.found
    critical = ", ".join(
        f"{kind} {seconds_text(t)}"
        for kind, t in sorted(found.critical_s().items(), key=lambda item: -item[1])
        if t > 0
    )
    rate = scaled_text(float(s.question.num_tokens / found.seconds), "tokens/s")
    told = f"; {s.framework.stack.source}" if s.framework else ""
    return [
        ("Plan", f"{s.plan_text}, schedule {found.schedule.name}"),
        ("Step", step_text(s)),
        ("Speed", f"{rate}, MFU {percent_text(s.mfu_frac)}"),
        ("Critical path", critical),
        ("Idle", f"{percent_text(found.bubble_frac())} of the stages' time"),
        ("Exposed", f"{seconds_text(found.exposed_s())} of weights and gradients on the way while "
                    "the stage waits"),
        ("Rung", f"{s.analytic.rung}, {s.stack_name}: {s.source}{told}"),
    ]  # fmt: skip


def _pieces_table(pieces: Mapping[str, Any]) -> Table:
    """Largest first; the sum of pieces, which the timeline agrees with to a few per cent."""
    times = {name: float(t) for name, t in pieces.items()}
    whole = sum(times.values())
    shown = show.table("slowest stage, piece by piece", "time", "share", right=("time", "share"))
    small = 0.0
    for name, t in sorted(times.items(), key=lambda item: -item[1]):
        if t < SMALL_FRAC * whole:
            small += t
        else:
            shown.add_row(name, seconds_text(t), percent_text(t / whole))
    if small:
        shown.add_row("smaller ones", seconds_text(small), percent_text(small / whole))
    shown.add_section()
    shown.add_row("sum of pieces", seconds_text(whole), "")
    return shown


def _memory_table(s: Simulated) -> Table:
    full, capacity = s.fullest, s.cluster.device.hbm.capacity_bytes
    shown = show.table(
        f"peak of memory, stage {full.stage}", "GiB", "share", "tensors",
        right=("GiB", "share", "tensors"),
    )  # fmt: skip
    for a in full.memory.alive_at_peak():
        shown.add_row(
            a.kind, f"{a.num_bytes / GIB:.2f}", percent_text(a.share_frac), str(a.num_tensors)
        )
    shown.add_section()
    shown.add_row(
        f"of {capacity / GIB:.1f} GiB", f"{full.peak_bytes / GIB:.2f}",
        percent_text(full.peak_bytes / capacity), "",
    )  # fmt: skip
    return shown

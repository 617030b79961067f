"""What `ridgeplan plan` asks of the training planner, and its proof and prices in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cli import show
from cli.quantity import percent_text, seconds_text
from hwmodels.errors import InputError
from hwmodels.units import GIB

if TYPE_CHECKING:
    from rich.table import Table

    from hwmodels.cluster import Cluster
    from simulator.planners.parallelism import Candidate, PlanChoice, Step
    from simulator.planners.prices import CurvePoint, Price
    from simulator.planners.training import Answer


def least_seconds(text: str | None) -> float:
    """A time limit; none where none is given."""
    from cli.quantity import parse

    if text is None:
        return math.inf
    seconds = parse(text, "s", "--time-limit")
    if not seconds > 0:
        raise InputError(f"--time-limit = '{text}' is no time; give 10s")
    return seconds


def bytes_given(text: str | None, option: str) -> float | None:
    """A size in bytes, None where none is given."""
    from cli.quantity import parse

    if text is None:
        return None
    size = parse(text, "bytes", option)
    if not 0 < size < math.inf:
        raise InputError(f"{option} = '{text}' is no size; give 48GB")
    return size


def training_options(
    memory_budget: str | None,
    host_memory: str | None,
    time_limit: str | None,
    gap: str,
    *,
    on: Cluster,
) -> dict[str, Any]:
    """What only the training planner takes."""
    from cli.host_memory import host_bytes
    from cli.quantity import parse

    return {
        "budget_bytes": bytes_given(memory_budget, "--memory-budget"),
        "host_bytes_per_node": host_bytes(host_memory, on),
        "time_limit_s": least_seconds(time_limit),
        "gap_frac": parse(gap, "frac", "--gap"),
    }


def searched(
    question: Step, asked: dict[str, Any], training: dict[str, Any]
) -> tuple[PlanChoice, Answer | None]:
    """The planner's answer; for training with the whole search, which prices are made from."""
    from simulator.planners.parallelism import plan_parallelism
    from simulator.planners.training import search_training
    from workloads.models.transformer import TrainStep

    if not isinstance(question, TrainStep):
        return plan_parallelism(question, **asked), None
    answer = search_training(question, **asked, **training)
    return answer.choice, answer


def stages_of(candidate: Candidate) -> list[dict[str, Any]]:
    """Every stage: its layers, their modes, its seconds and its bytes."""
    return [
        {
            "layers": own.num_layers,
            "modes": own.modes,
            "layers_by_kind": {kind: sum(m.values()) for kind, m in own.counts.items()},
            "modes_by_kind": own.counts,
            "seconds_per_micro_batch": cost.seconds,
            "memory_bytes": sum(cost.bytes_by_part.values()),
            "host_bytes": cost.host_bytes,
        }
        for own, cost in zip(candidate.stages, candidate.costs, strict=True)
    ]


def proof(choice: PlanChoice, answer: Answer | None, *, priced: bool) -> dict[str, Any]:
    """Status, seconds of solving, the best plan's stages, prices and the memory curve."""
    found: dict[str, Any] = {
        "status": choice.status,
        "solve_s": choice.solve_s,
        "stages": stages_of(choice.best),
        "prices": [],
        "memory_curve": [],
    }
    if answer is not None and priced:
        from simulator.planners.prices import curve_around, prices_of

        found["prices"] = prices_of(answer.best)
        found["memory_curve"] = curve_around(answer)
    return found


def stages_text(candidate: Candidate) -> str:
    """Layers by stage, runs of equal stages as one: '31 x 4, 2; 6 of 126 layers full'."""
    runs: list[tuple[int, int]] = []
    total: dict[str, int] = {}
    for stage in candidate.stages:
        size = stage.num_layers
        runs = [*runs[:-1], (size, runs[-1][1] + 1)] if runs and runs[-1][0] == size else [
            *runs, (size, 1)
        ]  # fmt: skip
        for mode, number in stage.modes.items():
            total[mode] = total.get(mode, 0) + number
    layers = ", ".join(f"{times} x {size}" if times > 1 else f"{size}" for size, times in runs)
    modes = ", ".join(f"{number} {mode}" for mode, number in total.items() if mode != "none")
    return f"{layers} layers" + (f"; activations of {modes}" if modes else "; nothing recomputed")


def search_text(choice: PlanChoice) -> str:
    """How far the answer is proven."""
    if not choice.best.stages:
        return (
            f"all {choice.num_evaluated:,} plans of the space evaluated, {choice.num_feasible:,} "
            f"fit: none is faster (gap {percent_text(choice.gap_frac)})"
        )
    gap = f"gap {percent_text(choice.gap_frac)}, {seconds_text(choice.solve_s)} of solving"
    beside = (
        f"{choice.num_evaluated:,} meshes with every split into stages and every mode of every "
        f"layer; of plans with equal stages {choice.num_feasible:,} fit"
    )
    if choice.status == "optimal":
        return f"{beside}: none is faster ({gap})"
    return f"{beside}: the search ended early, a faster one may exist ({gap})"


def explain(found: dict[str, Any], choice: PlanChoice) -> None:
    """Stages, prices and the memory curve as tables."""
    out = show.console()
    out.print(_stages(choice.best))
    out.print(_prices(found["prices"]))
    out.print(_curve(found["memory_curve"], float(choice.best.step.seconds)))


def program_of(answer: Answer) -> str:
    """The relaxation of the best plan's mesh, written out with its numbers."""
    from simulator.planners.prices import mesh_program
    from simulator.planners.program_text import text

    best = answer.best
    return text(mesh_program(best.figures.problem(best.index)))


def _stages(best: Candidate) -> Table:
    right = ("layers", "time", "GiB", "host GiB")
    table = show.table("stages", "layers", "modes", "time", "GiB", "host GiB", right=right)
    rows: list[tuple[int, int, dict[str, Any]]] = []
    for i, stage in enumerate(stages_of(best)):
        if rows and rows[-1][2] == stage:
            rows[-1] = (rows[-1][0], i, stage)
        else:
            rows.append((i, i, stage))
    for first, last, stage in rows:
        table.add_row(
            f"{first}" if first == last else f"{first} - {last}",
            f"{stage['layers']}",
            ", ".join(f"{n} {mode}" for mode, n in stage["modes"].items()),
            seconds_text(stage["seconds_per_micro_batch"]),
            f"{stage['memory_bytes'] / GIB:.2f}",
            f"{stage['host_bytes'] / GIB:.2f}",
        )
    return table


def _prices(prices: tuple[Price, ...]) -> Table:
    right = ("relaxed", "this plan")
    table = show.table("price of", "in", "relaxed", "this plan", right=right)
    for price in prices:
        own = (price.dual_s, price.step_s)
        table.add_row(
            price.resource, price.unit, *("-" if s is None else seconds_text(s) for s in own)
        )
    return table


def _curve(points: tuple[CurvePoint, ...], now_s: float) -> Table:
    table = show.table("budget", "best step", "against now", "same mesh", "plan", right=("budget",))
    for point in points:
        if point.seconds is None or point.plan is None:
            table.add_row(f"{point.budget_bytes / GIB:.1f} GiB", "nothing fits", "", "", "")
            continue
        same = "-" if point.same_mesh_s is None else seconds_text(point.same_mesh_s)
        table.add_row(
            f"{point.budget_bytes / GIB:.1f} GiB",
            seconds_text(point.seconds),
            f"{100 * (point.seconds / now_s - 1):+.2f} %",
            same,
            str(point.plan).replace(" recompute-none", ""),
        )
    return table

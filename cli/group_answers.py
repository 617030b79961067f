"""`plan sequences --method groups`: FlexSP's mixed groups as tables, JSON, program and chart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from cli import show
from cli.quantity import count_text, digits, percent_text, seconds_text
from cli.sequence_answers import (
    Asked,
    SequenceAnswer,
    cost_or_refusal,
    group_title,
    headline,
    micro_batches,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from simulator.planners.sequence_groups import StepPlan
    from simulator.variable_length import GroupCost

MOST_SHOWN: Final = 16
EXPLAINED_CLASSES: Final = 6
"""Length classes of the program that `--explain` prints; the search has up to 64."""
RUNG: Final = (
    "calibrated kernels and all-to-alls inside a node; links between nodes and ZeRO-3's exchange "
    "at their bound"
)


@dataclass(frozen=True)
class GroupAnswer(SequenceAnswer):
    """Mixed groups beside one size for all, and beside rings with the model whole."""

    method: ClassVar[str] = "groups"
    asked: Asked
    cost: GroupCost
    step: StepPlan
    document: dict[str, Any]

    @staticmethod
    def of(asked: Asked) -> GroupAnswer:
        """Planned within the time limit."""
        from simulator.planners.sequence_groups import plan_step

        cost = cost_or_refusal(asked)
        step = plan_step(
            asked.held, cost, asked.system.num_accelerators, gap_frac=asked.gap_frac,
            time_limit_s=asked.limit_s,
        )  # fmt: skip
        return GroupAnswer(asked, cost, step, _document(asked, cost, step))

    def record(self) -> dict[str, Any]:
        """The JSON document."""
        return self.document

    def tables(self) -> None:
        """For people."""
        _show(self.document)

    def explained(self) -> str:
        """The program of the slowest micro-batch."""
        return _explained(self.step, self.cost, self.asked.system.num_accelerators)

    def figure(self) -> go.Figure:
        """A bar for every group."""
        from cli.charts.groups import figure

        return figure(
            self.document, title=group_title(self.document), subtitle=_proof(self.document)
        )


def _document(asked: Asked, cost: GroupCost, step: StepPlan) -> dict[str, Any]:
    """The whole answer."""
    from simulator.planners.sequence_groups import best_homogeneous

    held = asked.held
    single = best_homogeneous(held, cost, asked.system.num_accelerators)
    return asked.record() | {
        "method": GroupAnswer.method, "rung": RUNG, "rank_tokens": cost.rank_tokens,
        "recomputed_frac": cost.recomputed_frac, "seconds": step.seconds, "lower_s": step.lower_s,
        "gap_frac": step.gap_frac, "cut_lower_s": step.cut_lower_s or None,
        "cut_gap_frac": step.seconds / step.cut_lower_s - 1 if step.cut_lower_s else None,
        "best_homogeneous_s": single.seconds,
        "gain_over_homogeneous": single.seconds / step.seconds,
        "steps": _rows(asked, cost, step, single),
        "micro_batches": micro_batches(step, held, cost),
    }  # fmt: skip


def _rows(asked: Asked, cost: GroupCost, step: StepPlan, single: StepPlan) -> list[dict[str, Any]]:
    """Seconds of a step by system, each beside the static one of its kind."""
    from simulator.planners.hybrid_data import (
        hybrid_step,
        least_ring,
        predicted_ring_cost,
        static_step,
    )
    from simulator.planners.sequence_groups import homogeneous_step

    held, ranks, limit = asked.held, asked.system.num_accelerators, asked.allowed
    degree = cost.least_degree(limit)
    groups = {
        f"Ulysses groups of {degree}": homogeneous_step(held, cost, ranks, degree).seconds,
        "best single size (FlexSP-BatchAda)": single.seconds,
        "mixed groups (FlexSP)": step.seconds,
    }
    room = int(cost.rank_tokens)
    ring = next((r for r in range(least_ring(limit, room), ranks) if ranks % r == 0), ranks)
    own = predicted_ring_cost(asked.config, on=asked.system, host_bytes=asked.host_bytes)
    given: dict[str, Any] = {"num_ranks": ranks, "rank_tokens": room}
    rings = {
        f"rings of {ring}": static_step(held, own, degree=ring, **given).seconds,
        "hybrid data parallel, as they come": hybrid_step(
            held, own, balance=False, offload=False, **given
        ).seconds,
        "hybrid data parallel, balanced (ByteScale)": hybrid_step(
            held, own, offload=asked.host_bytes > 0, **given
        ).seconds,
    }
    return [
        {"system": name, "seconds": seconds, "speedup": next(iter(kind.values())) / seconds}
        for kind in (groups, rings)
        for name, seconds in kind.items()
    ]


def _proof(document: dict[str, Any]) -> str:
    return (
        f"Mixed groups take {seconds_text(document['seconds'])}, "
        f"{digits(document['gain_over_homogeneous'], 2)} x as fast as the best single size; no "
        f"grouping of these micro-batches takes less than {seconds_text(document['lower_s'])} "
        f"(gap {percent_text(document['gap_frac'])})"
    )


def _of_all_cuts(document: dict[str, Any]) -> str:
    return (
        "No cut into micro-batches of adjacent lengths takes less than "
        f"{seconds_text(document['cut_lower_s'])} (gap {percent_text(document['cut_gap_frac'])})."
    )


def _show(document: dict[str, Any]) -> None:
    out = show.console()
    out.print(headline(document), style="bold")
    table = show.table("a step with", "time", "speedup", right=("time", "speedup"))
    for row in document["steps"]:
        speedup = f"{digits(row['speedup'], 2)} x"
        table.add_row(row["system"], seconds_text(row["seconds"]), speedup)
    out.print(table)
    right = ("sequences", "tokens", "time", "proven", "gap")
    table = show.table("groups (ranks x how many)", *right, right=right)
    batches = document["micro_batches"]
    for batch in batches[:MOST_SHOWN]:
        table.add_row(
            batch["shape"].strip("<>").replace(",", " "), str(batch["num_sequences"]),
            count_text(batch["num_tokens"]), seconds_text(batch["seconds"]),
            seconds_text(batch["lower_s"]), percent_text(batch["gap_frac"]),
        )  # fmt: skip
    out.print(table)
    if len(batches) > MOST_SHOWN:
        out.print(f"... and {len(batches) - MOST_SHOWN} more micro-batches (--json has them all)")
    out.print(_proof(document) + ".")
    if document["cut_lower_s"]:
        out.print(_of_all_cuts(document))
    out.print(f"Rung: {document['rung']}. Lengths: {document['source']}.")


def _explained(step: StepPlan, cost: GroupCost, num_ranks: int) -> str:
    """The program of the slowest micro-batch at its plan's makespan, with a solution."""
    from simulator.planners import program_text
    from simulator.planners.group_program import program_at
    from simulator.planners.program import solve

    held, plan = max(step.micro_batches, key=lambda one: one[1].seconds)
    program = program_at(held, cost, num_ranks, plan.seconds, num_classes=EXPLAINED_CLASSES)
    note = (
        f"\nThe slowest micro-batch ({plan}) in {EXPLAINED_CLASSES} length classes: the fewest "
        "ranks whose groups end by the plan's time. More than there are prove a time too short.\n"
    )
    return note + program_text.text(program, solve(program, time_limit_s=2.0))

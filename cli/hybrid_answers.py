"""`plan sequences --method hybrid`: ByteScale's hybrid data parallelism, searched and bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from cli import show
from cli.quantity import count_text, digits, percent_text, seconds_text
from cli.sequence_answers import Asked, SequenceAnswer, cost_or_refusal, group_title, headline

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from simulator.planners.hybrid_data import Schedule
    from simulator.planners.hybrid_search import HybridPlan

MOST_SHOWN: Final = 16
MOST_EXPLAINED: Final = 2_000
"""Units times ranks up to which the program is printed whole."""
RUNG: Final = (
    "calibrated kernels, rings of K and V at the links' bound; room for tokens as beside ZeRO-3's "
    "states, whose exchange is left out"
)


@dataclass(frozen=True)
class HybridAnswer(SequenceAnswer):
    """Rings as long as sequences need, beside rings of one size."""

    method: ClassVar[str] = "hybrid"
    asked: Asked
    plan: HybridPlan
    document: dict[str, Any]

    @staticmethod
    def of(asked: Asked) -> HybridAnswer:
        """Planned within the time limit."""
        from simulator.planners.hybrid_data import predicted_ring_cost
        from simulator.planners.hybrid_search import plan_hybrid

        room = int(cost_or_refusal(asked).rank_tokens)
        cost = predicted_ring_cost(asked.config, on=asked.system, host_bytes=asked.host_bytes)
        offloads = bool(asked.system.side_levels) and asked.host_bytes > 0
        plan = plan_hybrid(
            asked.held, cost, num_ranks=asked.system.num_accelerators, rank_tokens=room,
            offload=offloads, gap_frac=asked.gap_frac, time_limit_s=asked.limit_s,
        )  # fmt: skip
        rows = _rows(asked, cost, room, plan)
        return HybridAnswer(asked, plan, _document(asked, room, plan, rows, offloads))

    def record(self) -> dict[str, Any]:
        """The JSON document."""
        return self.document

    def tables(self) -> None:
        """For people."""
        _show(self.document)

    def explained(self) -> str:
        """The program of the units' bound, or how large it would be."""
        from simulator.planners import program_text
        from simulator.planners.hybrid_search import unit_program
        from simulator.planners.program import solve

        found = self.plan.schedule
        size = len(found.units) * found.num_ranks
        if size > MOST_EXPLAINED:
            work = sum(unit.degree * unit.seconds for unit in found.units) / found.num_ranks
            longest = max(unit.seconds for unit in found.units)
            return (
                f"\nmin C over {len(found.units)} units on {found.num_ranks} ranks ({size:,} whole "
                "variables, too many to print); its relaxation: C >= fixed "
                f"{found.fixed_s:.6g} + max(longest unit {longest:.6g}, ranks x seconds / ranks "
                f"{work:.6g}) s"
            )
        program = unit_program(found)
        return "\n" + program_text.text(program, solve(program, time_limit_s=2.0))

    def figure(self) -> go.Figure:
        """Every rank over time."""
        from cli.charts.boxes import figure

        found, kinds = self.plan.schedule, {}
        for degree in sorted({unit.degree for unit in found.units}, reverse=True):
            label = f"{degree} rank{'s' if degree > 1 else ''}"
            kinds[label] = _boxes(found, degree, self.asked.held)
        return figure(
            kinds, title=group_title(self.document), subtitle=_proof(self.document),
            footnote="Each box: a unit on one of its ranks. Dashed: no choice of ranks and no "
            "schedule ends sooner (proven).",
            axes=("seconds", "rank"), mark=self.plan.lower_s,
        )  # fmt: skip


def _boxes(
    found: Schedule, degree: int, held: np.ndarray
) -> list[tuple[float, float, float, float, str]]:
    boxes = []
    for unit, ranks, start in zip(found.units, found.ranks, found.starts.tolist(), strict=True):
        if unit.degree == degree:
            words = f"{len(unit.members)} sequences, {int(held[unit.members].sum()):,} tokens"
            boxes += [
                (start, start + unit.seconds, rank - 0.45, rank + 0.45, words)
                for rank in ranks.tolist()
            ]
    return boxes


def _rows(asked: Asked, cost: Any, room: int, plan: HybridPlan) -> list[dict[str, Any]]:
    """Seconds of a step by system, beside rings of the size that the longest allowed needs."""
    from simulator.planners.hybrid_data import hybrid_step, least_ring, static_step

    held, ranks = asked.held, asked.system.num_accelerators
    given: dict[str, Any] = {"num_ranks": ranks, "rank_tokens": room}
    ring = next((r for r in range(least_ring(asked.allowed, room), ranks) if ranks % r == 0), ranks)
    rows = {
        f"rings of {ring}": static_step(held, cost, degree=ring, **given).seconds,
        "hybrid, as they come": hybrid_step(
            held, cost, balance=False, offload=False, **given
        ).seconds,
        "hybrid, balanced (ByteScale)": plan.balanced.seconds,
        "hybrid, rings and order searched": plan.seconds,
    }
    first = next(iter(rows.values()))
    return [{"system": n, "seconds": s, "speedup": first / s} for n, s in rows.items()]


def _document(
    asked: Asked, room: int, plan: HybridPlan, rows: list[dict[str, Any]], offloads: bool
) -> dict[str, Any]:
    found = plan.schedule
    return asked.record() | {
        "method": HybridAnswer.method, "rung": RUNG, "rank_tokens": room, "offloads": offloads,
        "host_bytes": asked.host_bytes if offloads else 0.0,
        "seconds": plan.seconds, "lower_s": plan.lower_s, "gap_frac": plan.gap_frac,
        "units_lower_s": plan.units_lower_s, "units_gap_frac": plan.units_gap_frac,
        "balanced_s": plan.balanced.seconds, "solve_s": plan.solve_s, "steps": rows,
        "units": [
            {"degree": unit.degree, "seconds": unit.seconds, "start_s": start,
             "num_tokens": int(asked.held[unit.members].sum()), "ranks": ranks.tolist(),
             "sequences": unit.members.tolist()}
            for unit, ranks, start in zip(
                found.units, found.ranks, found.starts.tolist(), strict=True
            )
        ],
    }  # fmt: skip


def _proof(document: dict[str, Any]) -> str:
    return (
        f"Rings as long as needed take {seconds_text(document['seconds'])}; no choice of ranks "
        f"takes less than {seconds_text(document['lower_s'])} (gap "
        f"{percent_text(document['gap_frac'])})"
    )


def _show(document: dict[str, Any]) -> None:
    out = show.console()
    out.print(headline(document), style="bold")
    table = show.table("a step with", "time", "speedup", right=("time", "speedup"))
    for row in document["steps"]:
        table.add_row(row["system"], seconds_text(row["seconds"]), f"{digits(row['speedup'], 2)} x")
    out.print(table)
    right = ("ranks", "sequences", "tokens", "start", "time")
    table = show.table("unit", *right, right=right)
    units = sorted(document["units"], key=lambda unit: -unit["degree"] * unit["seconds"])
    for number, unit in enumerate(units[:MOST_SHOWN], 1):
        table.add_row(
            str(number), str(unit["degree"]), str(len(unit["sequences"])),
            count_text(unit["num_tokens"]), seconds_text(unit["start_s"]),
            seconds_text(unit["seconds"]),
        )  # fmt: skip
    out.print(table)
    if len(units) > MOST_SHOWN:
        out.print(f"... and {len(units) - MOST_SHOWN} smaller units (--json has them all)")
    out.print(_proof(document) + ".")
    out.print(
        f"These units alone: not below {seconds_text(document['units_lower_s'])} (gap "
        f"{percent_text(document['units_gap_frac'])})."
    )
    if not document["offloads"]:
        out.print("Nothing is offloaded: no link to a host, or no host memory, is known.")
    out.print(f"Rung: {document['rung']}. Lengths: {document['source']}.")

"""`plan sequences --method prepack`: prompts packed into rows, against padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from cli import show
from cli.memory_plans import gib
from cli.quantity import count_text, digits, percent_text, seconds_text
from cli.sequence_answers import Asked, SequenceAnswer, chart_title
from hwmodels.errors import InfeasibleError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from simulator.planners.prefill import PrefillPlan

MOST_SHOWN: Final = 16
MOST_DRAWN: Final = 64
"""Rows of the chart."""
PROMPTS: Final = 64
"""Prompts of a pass where none are given: the authors' batch."""
RUNG: Final = "calibrated kernels one after another on one accelerator; the host's packing left out"


@dataclass(frozen=True)
class PrefillAnswer(SequenceAnswer):
    """Rows and what they save."""

    method: ClassVar[str] = "prepack"
    asked: Asked
    plan: PrefillPlan
    document: dict[str, Any]

    @staticmethod
    def of(asked: Asked) -> PrefillAnswer:
        """Packed and proved within the time limit."""
        from simulator.planners.prefill import PACKED, plan_prefill

        asked.check_limit()
        _check_room(asked)
        device, num = asked.system.device, asked.num_prompts or PROMPTS
        plan = plan_prefill(
            asked.held, asked.config, device, num_prompts=num, room=asked.room,
            time_limit_s=asked.limit_s, gap_frac=asked.gap_frac,
        )  # fmt: skip
        packed = plan.way(PACKED)
        if packed.peak_bytes > device.hbm.capacity_bytes:
            raise InfeasibleError(_too_large(asked, packed, num))
        return PrefillAnswer(asked, plan, _document(asked, plan, num))

    def record(self) -> dict[str, Any]:
        """The JSON document."""
        return self.document

    def tables(self) -> None:
        """For people."""
        _show(self.document)

    def explained(self) -> str:
        """The pattern program of the pass with the most rows."""
        from simulator.planners import program_text
        from simulator.planners.prepacking import pattern_program
        from simulator.planners.program import solve

        found = max(self.plan.packings, key=lambda one: one.num_rows)
        program = pattern_program(found)
        return (
            f"\nThe pass of {len(found.held)} prompts with the most rows, {found.num_rows} of "
            f"{found.room} tokens; proven: at least {found.lower_rows} ({found.method}).\n"
            + program_text.text(program, solve(program, time_limit_s=2.0))
        )

    def figure(self) -> go.Figure:
        """Prompts in the rows of the first passes."""
        from cli.charts.boxes import figure

        kinds: dict[str, list[tuple[float, float, float, float, str]]] = {"prompts": [], "pad": []}
        row = 0
        for found in self.plan.packings:
            for members in found.members():
                at = 0
                for k in members.tolist():
                    end = at + int(found.held[k])
                    words = f"{end - at:,} tokens"
                    kinds["prompts"].append((at, end, row - 0.45, row + 0.45, words))
                    at = end
                kinds["pad"].append((at, found.len_row, row - 0.45, row + 0.45, "padding"))
                row += 1
            if row >= MOST_DRAWN:
                break
        rows = self.document["num_rows"]
        drawn = f"The first {row} of {rows} rows" if row < rows else f"All {rows} rows"
        title = chart_title(self.document, "prompts", f"one {self.document['device']}")
        return figure(
            kinds, title=title, subtitle=_proof(self.document),
            footnote=f"{drawn}; each line: a row of a packed pass, its prompts in order.",
            axes=("tokens", "row"),
        )  # fmt: skip


def _check_room(asked: Asked) -> None:
    """Refuse a prompt that is longer than a row."""
    longest = int(np.argmax(asked.held))
    if asked.room is not None and asked.held[longest] > asked.room:
        raise InfeasibleError(
            f"{asked.where(longest)}a prompt of {asked.held[longest]} tokens fits no row of "
            f"{asked.room}; give --row {asked.held[longest]} or leave it out"
        )


def _too_large(asked: Asked, packed: Any, num: int) -> str:
    """A pass that no device of this kind holds, and how many prompts one would hold."""
    from simulator.packed_prefill import packed as rows_of
    from simulator.planners.prepacking import pack

    device = asked.system.device
    longest_first = np.sort(asked.held)[::-1]

    def fits(count: int) -> bool:
        found = pack(longest_first[:count], asked.room, prove=False)
        return rows_of(asked.config, found).memory().total <= device.hbm.capacity_bytes

    low, high = 0, min(num, len(asked.held))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    way = f"--prompts {low} would fit" if low else "not even its longest prompt fits"
    return (
        f"a pass of {min(num, len(asked.held))} prompts of {asked.config.name} needs "
        f"{gib(packed.peak_bytes)} of the {gib(device.hbm.capacity_bytes)} of {device.id}, even "
        f"packed; {way}"
    )


def _document(asked: Asked, plan: PrefillPlan, num: int) -> dict[str, Any]:
    from simulator.planners.prefill import PACKED, PADDED

    capacity = asked.system.device.hbm.capacity_bytes
    first, packed = plan.way(PADDED), plan.way(PACKED)
    return asked.record() | {
        "method": PrefillAnswer.method, "device": asked.system.device.id, "rung": RUNG,
        "num_accelerators": 1, "prompts_per_pass": num, "row_tokens": asked.room,
        "num_rows": plan.num_rows, "lower_rows": plan.lower_rows, "gap_frac": plan.gap_frac,
        "status": "optimal" if plan.num_rows == plan.lower_rows else "feasible",
        "solve_s": sum(one.solve_s for one in plan.packings),
        "seconds": packed.seconds, "peak_bytes": packed.peak_bytes,
        "saved_frac": 1 - packed.num_tokens / first.num_tokens,
        "ways": [
            {"way": way.name, "seconds": way.seconds, "speedup": first.seconds / way.seconds,
             "num_tokens": way.num_tokens, "peak_bytes": way.peak_bytes,
             "fits": way.peak_bytes <= capacity}
            for way in plan.ways
        ],
        "passes": [
            {"num_prompts": len(one.held), "num_rows": one.num_rows, "lower_rows": one.lower_rows,
             "len_row": one.len_row, "padding_frac": one.padding_frac, "method": one.method,
             "status": one.status, "rows": [place[row].tolist() for row in one.members()]}
            for one, place in zip(plan.packings, plan.places, strict=True)
        ],
    }  # fmt: skip


def _headline(document: dict[str, Any]) -> str:
    return (
        f"{document['model']}, {document['num_sequences']} prompts of "
        f"{document['corpus'] or document['source']} ({count_text(document['num_tokens'])} tokens, "
        f"the longest {count_text(document['longest'])}) on one {document['device']}, "
        f"{document['prompts_per_pass']} a pass"
    )


def _proof(document: dict[str, Any]) -> str:
    rows, low = document["num_rows"], document["lower_rows"]
    proven = "no packing has fewer" if rows == low else f"no packing has fewer than {low}"
    return (
        f"{rows} rows, {percent_text(document['saved_frac'])} fewer tokens than padded; {proven} "
        f"(gap {percent_text(document['gap_frac'])})"
    )


def _show(document: dict[str, Any]) -> None:
    out = show.console()
    out.print(_headline(document), style="bold")
    right = ("time", "speedup", "tokens", "peak memory")
    table = show.table("all prompts read", *right, right=right)
    for way in document["ways"]:
        table.add_row(
            way["way"], seconds_text(way["seconds"]), f"{digits(way['speedup'], 2)} x",
            count_text(way["num_tokens"]),
            gib(way["peak_bytes"]) + ("" if way["fits"] else ", does not fit"),
        )  # fmt: skip
    out.print(table)
    columns = ("prompts", "rows", "at least", "tokens a row", "padding")
    table = show.table("pass", *columns, right=columns)
    for number, one in enumerate(document["passes"][:MOST_SHOWN], 1):
        table.add_row(
            str(number), str(one["num_prompts"]), str(one["num_rows"]), str(one["lower_rows"]),
            count_text(one["len_row"]), percent_text(one["padding_frac"]),
        )  # fmt: skip
    out.print(table)
    more = len(document["passes"]) - MOST_SHOWN
    if more > 0:
        out.print(f"... and {more} more passes (--json has them all)")
    out.print(_proof(document) + ".")
    out.print(f"Rung: {document['rung']}. Lengths: {document['source']}.")

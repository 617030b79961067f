"""`plan memory`'s answers as tables and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cli import show
from cli.quantity import percent_text, scaled_text, seconds_text
from hwmodels.units import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from simulator.planners.memory import MemoryPlan, Storage
    from simulator.planners.program import Solution
    from simulator.planners.rematerialise import RematerialisePlan
    from simulator.planners.storage import Placement
    from simulator.planners.swap import SwapPlan


def gib(num_bytes: float) -> str:
    """Bytes as people compare them with a device's memory."""
    return f"{num_bytes / GIB:.3f} GiB" if num_bytes >= GIB / 10 else scaled_text(num_bytes, "B")


def placement_record(found: Placement, answer: Solution | None = None) -> dict[str, Any]:
    """A placement with its proof; addresses in the order of the tensors."""
    t = found.tensors
    return {
        "status": found.status,
        "gap_frac": found.gap_frac,
        "peak_bytes": found.peak_bytes,
        "live_bytes": t.live_bytes,
        "lower_bytes": found.lower_bytes,
        "above_live_frac": found.above_live_frac,
        "method": found.method,
        "solve_s": found.solve_s,
        "proof": None if answer is None else {
            "engine": answer.engine, "status": answer.status, "bound": answer.bound,
            "reason": answer.reason, "solve_s": answer.solve_s,
        },
        "num_tensors": len(t),
        "tensors": [
            {"name": name, "bytes": size, "start": start, "end": end, "address": address}
            for name, size, start, end, address in zip(
                t.names, t.sizes.tolist(), t.starts.tolist(), t.ends.tolist(),
                found.addresses.tolist(), strict=True,
            )
        ],
    }  # fmt: skip


def storage_record(found: Storage) -> dict[str, Any]:
    """The better placement, and what the others need."""
    levels = found.two_levels
    return {
        **placement_record(found.best),
        "flat_peak_bytes": found.flat.peak_bytes,
        "two_levels": None if levels is None else {
            "peak_bytes": levels.whole.peak_bytes, "num_passes": levels.num_passes,
            "num_kinds": levels.num_kinds, "solve_s": levels.whole.solve_s,
        },
        "caching_allocator_bytes": found.caching_bytes,
    }  # fmt: skip


def swap_record(swap: SwapPlan) -> dict[str, Any]:
    """The swap's figures, per rank."""
    q = swap.question
    return {
        "alpha": swap.alpha,
        "swapped_frac": swap.swapped_frac,
        "swapped_tokens": swap.swapped_tokens,
        "num_tokens": q.num_tokens,
        "binding": swap.binding,
        "input_bytes": q.kept.input,
        "attention_bytes": q.kept.attention,
        "others_bytes": q.kept.others,
        "layer_forward_s": q.layer_s,
        "copy_s": swap.copy_s,
        "recompute_s": swap.recompute_s,
        "host_bytes": swap.host_bytes,
        "host_budget_bytes": q.host_bytes,
        "link_bytes_per_s": q.link_bytes_per_s,
        "buffers_bytes": swap.device_bytes,
        "num_layers": q.num_layers,
        "in_flight": q.in_flight,
    }


def schedule_record(found: RematerialisePlan) -> dict[str, Any]:
    """The schedule, stage by stage."""
    schedule, nodes = found.schedule, found.schedule.graph.nodes
    return {
        "status": found.solution.status,
        "gap_frac": found.solution.gap_frac,
        "reason": found.solution.reason,
        "engine": found.solution.engine,
        "solve_s": found.solution.solve_s,
        "seconds": schedule.seconds,
        "lower_s": found.lower_s,
        "once_s": schedule.graph.seconds,
        "overhead_frac": found.overhead_frac,
        "peak_bytes": schedule.peak_bytes,
        "budget_bytes": found.budget_bytes,
        "recomputed": schedule.recomputed,
        "stages": [
            {
                "computes": [nodes[i].name for i in sorted(done)],
                "keeps": [nodes[i].name for i in sorted(kept)],
            }
            for done, kept in zip(schedule.computed, schedule.kept, strict=True)
        ],
    }


# ---- for people ----------------------------------------------------------------------------------


def show_model(found: MemoryPlan, rung: str, stages: Sequence[SwapPlan] = ()) -> None:
    """What is swapped, and where the rest lies; of a pipeline, stage by stage."""
    out, q = show.console(), found.swap.question
    name = found.step.config.name
    out.print(f"Memory of {name}, {found.plan}, one rank of {found.cluster.id}", style="bold")
    out.print()
    out.print(show.pairs(_swap_lines(found.swap, rung)))
    if len(stages) > 1:
        out.print(_stages(stages))
        out.print(f"Of stage {found.stage}, which swaps least:")
    out.print(_storages(found))
    levels = found.swapped.two_levels
    if levels is not None:
        out.print(
            f"Two levels: {levels.num_kinds} kinds of pass solved for {levels.num_passes} passes "
            f"of {q.num_layers} layers; {found.swapped.best.method}."
        )


def _swap_lines(swap: SwapPlan, rung: str) -> list[tuple[str, str]]:
    q = swap.question
    return [
        (
            "Swap",
            f"a layer's input, attention's output and {percent_text(swap.swapped_frac)} of the "
            f"rest ({swap.swapped_tokens:,} of {q.num_tokens:,} tokens); bound by {swap.binding}",
        ),
        (
            "Copy",
            f"{gib(swap.layer_bytes)} a layer in {seconds_text(swap.copy_s)} at "
            f"{scaled_text(q.link_bytes_per_s, 'B/s')}, under a forward pass of "
            f"{seconds_text(q.layer_s)} ({rung})",
        ),
        ("Recompute", f"{seconds_text(swap.recompute_s)} a layer for the other tokens"),
        ("Host", f"{gib(swap.host_bytes)} of the {gib(q.host_bytes)} that a rank has"),
    ]


def _stages(stages: Sequence[SwapPlan]) -> Table:
    columns = ("layers", "in flight", "swapped", "host", "recompute a layer")
    table = show.table("stage", *columns, right=columns)
    for number, swap in enumerate(stages):
        table.add_row(
            str(number), str(swap.question.num_layers), f"{swap.question.in_flight:g}",
            percent_text(swap.swapped_frac), gib(swap.host_bytes), seconds_text(swap.recompute_s),
        )  # fmt: skip
    return table


def _storages(found: MemoryPlan) -> Table:
    columns = ("live", "planned", "above", "caching allocator")
    table = show.table("storage of one micro-batch", *columns, right=columns)
    for label, storage in (("with swapping", found.swapped), ("everything kept", found.kept)):
        best = storage.best
        table.add_row(
            label, gib(best.tensors.live_bytes), gib(best.peak_bytes),
            percent_text(best.above_live_frac), gib(storage.caching_bytes),
        )  # fmt: skip
    return table


def show_placement(found: Placement, title: str, rows: list[tuple[str, str]]) -> None:
    """A placement of given tensors."""
    out = show.console()
    out.print(title, style="bold")
    out.print()
    out.print(show.pairs([*_placement_lines(found), *rows]))


def _placement_lines(found: Placement) -> list[tuple[str, str]]:
    return [
        ("Planned", f"{gib(found.peak_bytes)}, {percent_text(found.above_live_frac)} above the "
                    f"{gib(found.tensors.live_bytes)} that are alive at once"),
        ("Proof", f"{found.status}: at least {gib(found.lower_bytes)} are needed "
                  f"(gap {percent_text(found.gap_frac)})"),
        ("Found", f"{found.method}, in {seconds_text(found.solve_s)}"),
    ]  # fmt: skip


def show_schedule(found: RematerialisePlan) -> None:
    """What is computed again."""
    out, schedule = show.console(), found.schedule
    num = len(schedule.graph.nodes)
    out.print(f"Rematerialisation of {num} nodes within {gib(found.budget_bytes)}", style="bold")
    out.print()
    again = ", ".join(
        name if count == 1 else f"{name} ({count} times)"
        for name, count in schedule.recomputed.items()
    )
    solution = found.solution
    proof = (
        f"{solution.status}: no schedule takes less than {seconds_text(found.lower_s)} "
        f"(gap {percent_text(solution.gap_frac)}; {solution.engine}, "
        f"{seconds_text(solution.solve_s)})"
    )
    out.print(
        show.pairs(
            [
                ("Time", f"{seconds_text(schedule.seconds)}, {percent_text(found.overhead_frac)} "
                         "above every node once"),
                ("Memory", f"{gib(schedule.peak_bytes)} at most"),
                ("Again", again or "nothing"),
                ("Proof", proof + (f"; {solution.reason}" if solution.reason else "")),
            ]
        )
    )  # fmt: skip

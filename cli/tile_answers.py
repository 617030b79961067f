"""`plan tiles`' answers: as tables, as JSON and as the program with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from cli import show
from cli.quantity import capacity_text, parse_count, percent_text, seconds_text, shown
from cli.questions import pairs
from hwmodels.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from hwmodels.device import Device
    from simulator.planners.rnn_tiling import RnnTiling
    from simulator.planners.tiles import Kernel, TilePlan

KIB: Final = 1024
RNN_SIZES: Final = ("head_dim", "num_heads", "gates", "batch")
RNN_KEYS: Final = (*RNN_SIZES, "dtype", "direction", "rules")
MOST_STEPS: Final = 3
"""Steps of the curve that people are shown on either side; JSON has all."""


# ---- a matmul or attention ---------------------------------------------------------------------


def plan_record(plan: TilePlan) -> dict[str, Any]:
    """The JSON document."""
    chip = plan.chip
    return {
        "op": plan.op.name, "device": chip.device.id, "instruction": chip.instruction.kind,
        "objective": "modelled seconds", "status": plan.status, "gap_frac": plan.gap_frac,
        "bound_s": plan.bound_s, "solve_s": plan.solve_s, "num_kernels": plan.num_kernels,
        "constants": plan.source,
        "limits": {
            "smem_bytes_per_block": chip.block_smem_bytes, "smem_bytes": chip.smem_bytes,
            "registers": chip.registers, "registers_per_thread": chip.thread_registers,
            "tensor_memory_bytes": chip.tensor_memory_bytes,
        },
        "best": _kernel_record(plan.best),
        "runners_up": [
            _kernel_record(one.kernel) | {"slower_frac": one.slower_frac, "reason": one.reason}
            for one in plan.runners_up
        ],
        "bindings": [
            {"limit": one.limit, "gain_frac": one.gain_frac} | _kernel_record(one.kernel)
            for one in plan.bindings
        ],
        "one_more_kib_s": plan.best.seconds - plan.seconds_with(KIB),
        "smem_curve": [
            {"more_smem_bytes": p.more_smem_bytes, "seconds": p.seconds, "values": p.values}
            for p in plan.curve
        ],
    }  # fmt: skip


def _kernel_record(kernel: Kernel) -> dict[str, Any]:
    return {
        "values": kernel.values, "seconds": kernel.seconds, "smem_bytes": kernel.smem_bytes,
        "registers_per_thread": kernel.registers, "parts": kernel.parts,
    }  # fmt: skip


def show_plan(plan: TilePlan) -> None:
    """The tables for people."""
    out = show.console()
    out.print(
        f"{plan.op.name} on {plan.chip.device.name} ({plan.chip.instruction.kind}): "
        f"{seconds_text(plan.best.seconds)}, the best of {plan.num_kernels:,} kernels, "
        f"{_proof(plan)} in {seconds_text(plan.solve_s)}",
        style="bold",
    )
    table = show.table("tiles", "time", "smem", "registers", "why not", right=("time", "registers"))
    table.add_row(*_cells(plan.best), "the best")
    for one in plan.runners_up:
        table.add_row(*_cells(one.kernel), f"+{percent_text(one.slower_frac)}: {one.reason}")
    out.print(table)
    out.print(show.pairs([*_binding_rows(plan), *_curve_rows(plan), ("Constants", plan.source)]))


def _proof(plan: TilePlan) -> str:
    if plan.status == "optimal":
        return "proven by exhaustion (gap 0)"
    return (
        f"not all listed (gap {percent_text(plan.gap_frac)} to a bound of "
        f"{seconds_text(plan.bound_s)})"
    )


def _cells(kernel: Kernel) -> tuple[str, str, str, str]:
    return (
        values_text(kernel.values), seconds_text(kernel.seconds),
        f"{kernel.smem_bytes / KIB:.1f} KiB", str(kernel.registers),
    )  # fmt: skip


def values_text(values: Mapping[str, int]) -> str:
    """Tiles first, then what is not 1.

    >>> values_text({"tile_m": 128, "units_m": 2, "tile_n": 256, "stages": 3, "splits": 1})
    '128x256, units_m 2, stages 3'
    """
    tile = "x".join(str(value) for name, value in values.items() if name.startswith("tile"))
    rest = [f"{k} {v}" for k, v in values.items() if not k.startswith("tile") and v != 1]
    return ", ".join([tile, *rest])


def _binding_rows(plan: TilePlan) -> list[tuple[str, str]]:
    rows = [
        (
            "Binding",
            f"{one.limit}: without it {percent_text(one.gain_frac)} faster "
            f"({values_text(one.kernel.values)})",
        )
        for one in plan.bindings
    ]
    if plan.status != "optimal":
        return [("Binding", "not known before all kernels are listed; raise --time-limit")]
    return rows or [("Binding", "no single limit: none alone would allow a faster kernel")]


def _curve_rows(plan: TilePlan) -> list[tuple[str, str]]:
    """What more and less shared memory would be worth."""
    gain = plan.best.seconds - plan.seconds_with(KIB)
    rows = [("One more KiB", f"of shared memory is worth {seconds_text(gain)}")]
    later = [p for p in plan.curve if p.more_smem_bytes > 0][:MOST_STEPS]
    rows += [
        ("", f"{p.more_smem_bytes / KIB:.1f} KiB more: {seconds_text(p.seconds)} "
         f"(-{percent_text(1 - p.seconds / plan.best.seconds)}, {values_text(p.values)})")
        for p in later
    ]  # fmt: skip
    steps = [p for p in plan.curve if p.more_smem_bytes <= 0]
    if steps[-1].more_smem_bytes < 0:
        spare = -steps[-1].more_smem_bytes / KIB
        rows.append(("Less", f"up to {spare:.1f} KiB less costs nothing"))
    for below, at in list(pairwise(steps))[::-1][:MOST_STEPS]:
        rows.append(("", f"{-at.more_smem_bytes / KIB:.1f} KiB less, and one byte: "
                     f"{seconds_text(below.seconds)} "
                     f"(+{percent_text(below.seconds / plan.best.seconds - 1)})"))  # fmt: skip
    return rows


def explained(plan: TilePlan) -> str:
    """The program over the undominated kernels, solved by a solver as a second opinion."""
    from simulator.planners.program import solve
    from simulator.planners.program_text import text

    return text(plan.program, solve(plan.program))


# ---- FlashRNN ----------------------------------------------------------------------------------


def rnn_answer(params: list[str], device: Device) -> tuple[RnnTiling, dict[str, Any]]:
    """FlashRNN's program on a device: the authors' preferred tiling, and the JSON document."""
    from hwmodels.dtypes import dtype
    from simulator.planners.rnn_tiling import FORWARD, RELEASED, Layer, limits_of, plan_rnn_tiling

    given = dict(pairs(params, example="head_dim=768"))
    for key in given:
        if key not in RNN_KEYS:
            raise UnknownNameError("parameter of flash_rnn", shown(key), RNN_KEYS,
                                   f"give {', '.join(RNN_KEYS)}")  # fmt: skip
    if "head_dim" not in given:
        raise InputError("flash_rnn needs head_dim; add -p head_dim=768")
    sizes: dict[str, Any] = {
        key: parse_count(given[key], f"flash_rnn: {key}") for key in RNN_SIZES if key in given
    }
    if "dtype" in given:
        sizes["dtype"] = dtype(given["dtype"])
    rules, direction = given.get("rules", RELEASED), given.get("direction", FORWARD)
    found = plan_rnn_tiling(Layer(**sizes), on=device, direction=direction, rules=rules)
    limits = limits_of(device)
    record = {
        "op": "flash_rnn", "device": device.id, "status": "optimal", "gap_frac": 0.0,
        "objective": "the authors' order of preference", "rules": rules, "direction": direction,
        "head_dim": found.layer.head_dim, "padded_head_dim": found.head_dim,
        "values": dict(found.values), "num_blocks": found.num_blocks,
        "num_solutions": found.num_solutions,
        "limits": {"num_sms": limits.num_sms, "smem_bytes": limits.smem_bytes,
                   "register_bytes": limits.register_bytes, "max_threads": limits.max_threads},
    }  # fmt: skip
    return found, record


def show_rnn(record: Mapping[str, Any]) -> None:
    """The tiling for people."""
    out = show.console()
    out.print(
        f"flash_rnn {record['direction']} on {record['device']}: a head of {record['head_dim']} "
        f"padded to {record['padded_head_dim']}, {record['num_blocks']} blocks, the first of "
        f"{record['num_solutions']:,} tilings in the authors' order",
        style="bold",
    )
    limits = record["limits"]
    out.print(show.pairs([
        *((name, str(value)) for name, value in record["values"].items()),
        ("limits", f"{limits['num_sms']} SMs, {capacity_text(limits['smem_bytes'])} of shared "
         f"memory a block, {limits['max_threads']} threads"),
    ]))  # fmt: skip


def rnn_rules(found: RnnTiling, record: Mapping[str, Any], device: Device) -> str:
    """FlashRNN's constraints with their numbers at the tiling that was taken."""
    import numpy as np

    from simulator.planners.rnn_tiling import (
        COMMITTED,
        Layer,
        committed_rules,
        limits_of,
        released_rules,
    )

    layer = found.layer
    padded = Layer(head_dim=found.head_dim, num_heads=layer.num_heads, gates=layer.gates,
                   batch=layer.batch, dtype=layer.dtype)  # fmt: skip
    build = committed_rules if record["rules"] == COMMITTED else released_rules
    rules = build(padded, limits_of(device), found.direction)
    point = {name: np.array([value]) for name, value in found.values.items()}
    lines = [f"tiles of flash_rnn: {len(rules.domains)} whole variables, "
             f"{len(rules.constraints)} rows"]  # fmt: skip
    for row in rules.constraints:
        left, right = (int(np.max(side(point))) for side in (row.left, row.right))
        word = "divided by" if row.relation == "%" else row.relation
        lines.append(f"  {row.name} ({', '.join(row.uses)}): {left:,} {word} {right:,}")
    return "\n".join(lines)

"""Compiled kernels as tables and as JSON: what they take, what they hold, how long they last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli import show
from cli.quantity import capacity_text, count_text, digits, percent_text, seconds_text

if TYPE_CHECKING:
    from simulator.instruction_issue import IssueTime
    from simulator.occupancy import Occupancy
    from validate.inspection.binary import Inspection
    from validate.inspection.ledger import Entry
    from validate.inspection.sass import Loop

_FAMILIES = (
    ("matrix", ("HMMA", "IMMA", "DMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTC")),
    ("async copy", ("LDGSTS",)),
    ("TMA", ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")),
    ("special", ("MUFU",)),
)  # fmt: skip
_HEADS = ("matrix", "async", "TMA", "MUFU")
"""Their columns: matrix products, asynchronous copies, tensor copies, special functions."""


def families(counts: Mapping[str, int]) -> dict[str, int]:
    """Instructions of the families that matter most."""
    return {
        family: sum(n for kind, n in counts.items() if kind.startswith(starts))
        for family, starts in _FAMILIES
    }


def occupancy_at(found: Inspection, arch: int) -> Occupancy:
    """Blocks of an SM of that architecture."""
    from hwmodels import catalog
    from simulator.occupancy import TYPICAL, occupancy

    return occupancy(found.resources, catalog.device(TYPICAL[arch]))


def inspection_record(found: Inspection, arch: int) -> dict[str, Any]:
    """One binary as JSON."""
    from validate.inspection import ledger

    fits = occupancy_at(found, arch)
    made = ledger.plain(found)
    made["source"] = [
        x | ({"line": loop.line} if loop.line else {})
        for x, loop in zip(made["source"], found.source, strict=True)
    ]
    return {"arch": f"sm_{arch}"} | made | {
        "spill_bytes": found.spill_bytes,
        "occupancy": {
            "blocks_per_sm": fits.blocks, "warps_frac": fits.warps_frac, "bound": fits.bound,
            "limits": dict(fits.limits),
        },
    }  # fmt: skip


def entry_record(entry: Entry) -> dict[str, Any]:
    """One shipped binary as JSON."""
    named = {"kernel": entry.kernel, "name": entry.name, "triton": entry.triton}
    return named | inspection_record(entry.found, entry.arch)


def show_list(entries: Iterable[Entry]) -> None:
    """Every kernel with its binaries by architecture."""
    found = list(entries)
    archs = sorted({e.arch for e in found})
    table = show.table(
        "kernel", *(f"sm_{a}" for a in archs), "registers", "smem KiB", "spilling",
        right=(*(f"sm_{a}" for a in archs), "registers", "smem KiB", "spilling"),
    )  # fmt: skip
    for record in list_records(found):
        registers = record["registers"]
        table.add_row(
            record["kernel"], *(str(record["binaries"].get(f"sm_{a}", "-")) for a in archs),
            f"{registers[0]}-{registers[1]}", f"{record['most_smem_bytes'] / 1024:.1f}",
            str(record["spilling"]),
        )  # fmt: skip
    show.console().print(table)
    versions = ", ".join(sorted({e.triton for e in found}))
    print(f"{len(found)} binaries, compiled ahead of time by triton {versions}")


def list_records(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The list as JSON."""
    made = []
    for kernel in sorted({e.kernel for e in entries}):
        some = [e for e in entries if e.kernel == kernel]
        registers = [e.found.registers for e in some]
        binaries: dict[str, int] = {}
        for e in some:
            binaries[f"sm_{e.arch}"] = binaries.get(f"sm_{e.arch}", 0) + 1
        made.append(
            {
                "kernel": kernel, "binaries": binaries,
                "registers": [min(registers), max(registers)],
                "most_smem_bytes": max(e.found.smem_bytes for e in some),
                "spilling": sum(e.found.spill_bytes > 0 for e in some),
            }
        )  # fmt: skip
    return made


def show_entries(entries: Sequence[Entry]) -> None:
    """The configurations of one kernel, one a line."""
    right = ("regs", "spill", "KiB", "blocks", *_HEADS)
    table = show.table("function, tiles", *right, right=right)
    before = ""
    for e in entries:
        function, _, tiles = e.name.rpartition(":")
        if function != before:
            table.add_section()
            table.add_row(function)
            before = function
        fits = occupancy_at(e.found, e.arch)
        table.add_row(
            f"  {tiles}", str(e.found.registers), str(e.found.spill_bytes),
            f"{e.found.smem_bytes / 1024:.1f}", str(fits.blocks),
            *(str(n or "-") for n in families(e.found.code.counts).values()),
        )  # fmt: skip
    show.console().print(table)
    print(
        "KiB of shared memory a block; blocks on one SM at a time (why no more: --config LABEL);\n"
        "wN and sN: warps and stages; instructions are those of one warp"
    )


def show_one(name: str, arch: int, found: Inspection) -> None:
    """One binary in full: what it takes, its instructions, its loops."""
    fits = occupancy_at(found, arch)
    limits = ", ".join(f"{k} {v}" for k, v in fits.limits.items())
    lines = [
        (name, f"sm_{arch}"),
        ("registers", f"{found.registers} a thread"),
        ("spills", f"{found.spill_bytes} bytes (stack {found.stack_bytes})"),
        ("shared memory", f"{found.smem_bytes} bytes a block"),
        ("warps", _warps(found)),
    ]
    if found.tensor_columns:
        lines.append(("tensor memory", f"{found.tensor_columns} of 512 columns"))
    lines += [
        ("blocks per SM", f"{fits.blocks} ({fits.bound}): {limits}"),
        ("warps of an SM", percent_text(fits.warps_frac)),
    ]
    show.console().print(show.pairs(lines))
    _show_counts(found)
    _show_source(found)


def _warps(found: Inspection) -> str:
    if found.num_warps == found.plain_warps:
        return str(found.num_warps)
    return f"{found.num_warps} ({found.plain_warps} asked for, the rest are specialised)"


def _show_counts(found: Inspection) -> None:
    """Instructions by kind, all and in each loop."""
    loops = [x for x in found.code.loops or () if not x.is_wait]
    heads = [_head(n, x, found, loops) for n, x in enumerate(loops, start=1)]
    table = show.table("instructions of a warp", "all", *heads, right=("all", *heads))
    for kind, number in found.code.counts.items():
        inside = [str(x.counts[kind]) if kind in x.counts else "-" for x in loops]
        table.add_row(kind, str(number), *inside)
    show.console().print(table)
    if found.code.loops is None:
        print(f"loops: unknown, {found.code.why_unknown}")
    elif not loops:
        print("no loops")


def _head(number: int, loop: Loop, found: Inspection, shown: Sequence[Loop]) -> str:
    """A loop's name, with the loop around it."""
    if loop.outer is None or found.code.loops is None:
        return f"loop {number}"
    around = found.code.loops[loop.outer]
    inside = next((n for n, x in enumerate(shown, start=1) if x is around), None)
    return f"loop {number}" + (f" in {inside}" if inside else "")


def _show_source(found: Inspection) -> None:
    """What a pass of each source loop computes and moves."""
    right = ("matrix flops", "loads", "stores", "special ops")
    table = show.table("source, one block", *right, right=right)
    for number, loop in enumerate(found.source):
        line = f", line {loop.line}" if loop.line else ""
        where = f"{'  ' * loop.depth}loop {number}{line}, a pass" if number else "outside loops"
        table.add_row(
            where, count_text(loop.dot_flops), capacity_text(loop.load_bytes),
            capacity_text(loop.store_bytes), count_text(loop.special_ops),
        )  # fmt: skip
    show.console().print(table)


def time_record(found: IssueTime, notes: Sequence[str]) -> dict[str, Any]:
    """An estimate as JSON."""
    fits = found.occupancy
    return {
        "rung": "bound", "seconds": found.seconds,
        "interval_s": [found.lower_s, found.upper_s], "bound": found.bound,
        "resources_s": dict(found.resources), "waves": found.waves, "tail_frac": found.tail_frac,
        "blocks_per_sm": fits.blocks, "occupancy_bound": fits.bound,
        "warps_frac": fits.warps_frac, "notes": list(notes),
    }  # fmt: skip


def show_time(name: str, device: str, found: IssueTime, notes: Sequence[str]) -> None:
    """An estimate for people."""
    low, high = seconds_text(found.lower_s), seconds_text(found.upper_s)
    fits = found.occupancy
    lines = [
        (name, f"on {device}"),
        ("time", f"{seconds_text(found.seconds)} (from instructions alone, nothing fitted)"),
        ("between", f"{low} (all overlaps) and {high} (nothing overlaps, no cache)"),
        ("bound by", found.bound),
        ("blocks per SM", f"{fits.blocks} ({fits.bound})"),
        ("waves", f"{digits(found.waves)}; {percent_text(found.tail_frac)} of the last is empty"),
    ]
    show.console().print(show.pairs(lines))
    table = show.table("resource", "time", right=("time",))
    for resource, seconds in sorted(found.resources.items(), key=lambda x: -x[1]):
        if seconds:
            table.add_row(resource, seconds_text(seconds))
    show.console().print(table)
    for note in notes:
        print(f"note: {note}")

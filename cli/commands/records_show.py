"""`ridgeplan records show`: timings by kernel and implementation, beside their bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from cli import show
from cli.options import AsJson
from cli.progress import patience
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from validate.record_files import Held

RecordFiles: TypeAlias = Annotated[
    list[Path], typer.Argument(metavar="PATH", help="records.jsonl, or the folder of a profile.")
]


def records_show(
    path: RecordFiles,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", "-k", metavar="NAME", help="Only this kernel; may repeat."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show records: times, achieved shares of the bound, intervals, flags.

    The interval holds the median at 95 %. The bound is the roofline of the counts, of a replayed
    kernel where the L2 was warm.

    \b
    Example:
      ridgeplan records show h200/ -k gemm
    """
    from validate.record_files import held, merged, path_of
    from validate.session import read_store

    with patience("reading records"):
        records, _ = merged(path)
        if kernel:
            records = [r for r in records if r.trial.kernel in set(kernel)]
        if not records:
            raise InputError("no record" + (f" of {', '.join(kernel)}" if kernel else "") +
                             " in there; profile first, or give another file")  # fmt: skip
        found = held(records)
    refused = [entry for p in path for entry in read_store(path_of(p).parent).refused]
    refused = [e for e in refused if not kernel or e.trial.kernel in kernel]
    if as_json:
        lines = [{"trial": str(e.trial), "kind": e.kind, "reason": e.reason} for e in refused]
        show.print_json({"records": [_document(h) for h in found], "refused": lines})
        return
    _print(found)
    if refused:
        first = refused[0]
        print(f"{len(refused)} refused; the first: {first.trial}: {first.kind}: {first.reason}")


def _document(held: Held) -> Mapping[str, Any]:
    r = held.record
    return {
        "gpu": r.environment.gpu,
        "kernel": r.trial.kernel,
        "implementation": r.implementation,
        "dtype": r.case.dtype,
        "params": dict(r.case.params),
        "seconds": r.seconds,
        "low_s": r.low_s,
        "high_s": r.high_s,
        "bound_s": held.bound_s,
        "bound_frac": held.bound_frac,
        "launch": r.launch,
        "l2_state": r.environment.l2_state,
        "method": r.method,
        "flags": list(r.flags),
        "error": r.error,
        "measured_at": r.measured_at,
    }


def _print(found: Sequence[Held]) -> None:
    """A table a GPU and kernel."""
    out = show.console()
    right = ("time", "of bound", "±")
    groups: dict[tuple[str, str], list[Held]] = {}
    for h in found:
        groups.setdefault((h.record.environment.gpu, h.record.trial.kernel), []).append(h)
    for (gpu, kernel), members in groups.items():
        made = show.table(
            "case", "implementation", *right, "L2", "notes", title=f"{kernel} on {gpu}", right=right
        )
        for h in members:
            made.add_row(*_row(h))
        out.print(made)


def _row(held: Held) -> tuple[str, ...]:
    r = held.record
    sizes = " ".join(f"{name}={value}" for name, value in r.case.params.items())
    half = r.half_width_frac
    return (
        f"{r.case.dtype} {sizes}",
        r.implementation or "-",
        time_text(r.seconds),
        "-" if math.isnan(held.bound_frac) else f"{held.bound_frac * 100:.0f} %",
        "-" if half is None else f"{half * 100:.1f} %",
        r.environment.l2_state,
        ", ".join(filter(None, (r.launch, *r.flags))),
    )


def time_text(seconds: float) -> str:
    """Seconds in the unit that shows them best.

    >>> time_text(1.234e-5), time_text(0.0123), time_text(2.0)
    ('12.34 us', '12.3 ms', '2 s')
    """
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds:.4g} s"

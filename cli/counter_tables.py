"""Counted bytes beside hardware counters, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import show
from cli.quantity import shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from validate.counters import Held, Uncounted


def show_counters(path: Path, *, as_json: bool) -> None:
    """What a file of counters says of the counts; one line where there are none."""
    from validate.counters import NO_NCU, found_ncu, held, path_of, read_counters

    if not path.exists():
        raise InputError(f"--counters {shown(path, 200)}: no such file or folder")
    if not path_of(path).is_file():
        how = f"python -m validate.counters --out {path}"
        why = NO_NCU if found_ncu() is None else "none were read yet"
        if as_json:
            show.print_json({"counters": [], "without": [{"trial": None, "reason": why}]})
        else:
            print(f"no counters in {shown(path, 200)}: {why}; `{how}` reads them on a GPU")
        return
    counted, missing = read_counters(path)
    found, reasons = held(counted)
    if as_json:
        without = [{"trial": str(e.trial) if e.trial else None, "reason": e.reason}
                   for e in missing]  # fmt: skip
        show.print_json({"counters": [_document(h) for h in found], "without": without,
                         "uncounted": reasons})  # fmt: skip
        return
    _print(found, missing, reasons)


def _document(held: Held) -> Mapping[str, Any]:
    from validate.counters import BOUNDARIES

    return {
        "trial": str(held.counted.trial),
        "gpu": held.counted.gpu,
        "kernels": list(held.counted.kernels),
        "working_set_bytes": held.working_set_bytes,
        "counted_bytes": {level: held.counts.get(level) for level in BOUNDARIES},
        "measured_bytes": {level: held.counted.bytes_of(level) for level in BOUNDARIES},
        "metrics": dict(held.counted.metrics),
        "judged": held.judged,
        "kept": held.kept,
    }


def _print(found: Sequence[Held], missing: Sequence[Uncounted], reasons: Mapping[str, int]) -> None:
    from validate.counters import BOUNDARIES, BUSY, L2S, LIMIT_FRAC, TENSOR_BUSY

    out, right = show.console(), (*BOUNDARIES, "tensor", "busy")
    if found:
        title = "counted bytes / counter's, by memory level"
        made = show.table("kernel", "case", *right, "", title=title, right=right)
        made.padding = (0, 1, 0, 0)
        for h in found:
            trial = h.counted.trial
            sizes = " ".join(f"{name}={value}" for name, value in trial.case.params.items())
            flag = "" if not h.judged or h.kept else f"off by more than {LIMIT_FRAC:.0%}"
            made.add_row(
                trial.kernel, shown(f"{trial.case.dtype} {sizes}", 60),
                *(_number(h.ratio(level)) for level in BOUNDARIES),
                *(_share(h.counted.metrics.get(name)) for name in (TENSOR_BUSY, BUSY)), flag,
            )  # fmt: skip
        out.print(made)
        judged = [h for h in found if h.judged]
        off = sum(not h.kept for h in judged)
        out.print(
            f"{off} of {len(judged)} launches whose working set exceeds {L2S:g} L2s lie more than "
            f"{LIMIT_FRAC:.0%} off in device memory; at most one L2 of writes may follow a "
            "kernel's end uncounted."
        )
    for entry in missing:
        out.print(f"{entry.trial or 'no counters'}: {entry.reason}")
    for reason, n in reasons.items():
        out.print(f"{n} without a count: {reason}")


def _number(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.3f}"


def _share(frac: float | None) -> str:
    return "-" if frac is None else f"{frac:.0%}"

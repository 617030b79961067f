"""Records fitted and the fit shown: what each model learned, and which records it left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import given, show
from cli.progress import patience
from cli.quantity import shown
from cli.readings import read_profiles
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.calibration import Calibration
    from validate.fit_report import FitReport, Usable
    from validate.record import Record


def usable_rows(path: Path, device: Sequence[str] | None) -> tuple[Usable, str]:
    """The rows of one device's records that may be fitted, and the device's id.

    `device` names it, or says what a GPU name of the records means (GPU=DEVICE).
    """
    from validate.fit_report import usable

    named = [name for name in device or () if "=" in name]
    targets = given.devices(named)
    with patience(f"reading {shown(path)}"):
        records, refused = read_profiles(path)
        device_id = _device(path, records, [d for d in device or () if d not in named], targets)
        found = usable(records, targets)
    mine = tuple(row for row in found.rows if row.device_id == device_id)
    left_out = Counter(found.left_out)
    left_out["of another device"] += len(found.rows) - len(mine)
    left_out.update(f"refused when it was profiled: {entry.kind}" for entry in refused)
    return replace(found, rows=mine, left_out={k: n for k, n in left_out.items() if n}), device_id


def _device(
    path: Path, records: Sequence[Record], names: Sequence[str], targets: Mapping[str, str]
) -> str:
    """The one device that is asked for, or the one that the records are of."""
    from hwmodels import catalog
    from validate.recorded import device_of

    gpus = dict.fromkeys(record.environment.gpu for record in records)
    have = {device_of(gpu, targets): gpu for gpu in gpus}
    wanted = [catalog.device(name).id for name in names]
    if len(wanted) > 1:
        raise InputError("records are fitted for one device at a time; give one --device")
    known = [d for d in have if d is not None]
    if not known:
        gpu = shown(next(iter(gpus)), 80)
        raise InputError(
            f"{shown(path, 200)}: GPU '{gpu}' is in no catalogue; say which device it is: "
            f"--device '{gpu}=DEVICE', or a TOML file of its figures"
        )
    if wanted and wanted[0] not in known:
        there = ", ".join(f"{d} ({shown(have[d], 60)})" for d in known)
        raise InputError(
            f"{shown(path, 200)}: holds records of {there}, none of {wanted[0]}; "
            f"give --device {known[0]}, or another file"
        )
    if not wanted and len(known) > 1:
        raise InputError(f"{shown(path, 200)}: holds records of {', '.join(known)}; give --device")
    return wanted[0] if wanted else known[0]


def fitted(
    found: Usable,
    device_id: str,
    models: Sequence[str] | None,
    donors: Sequence[Calibration],
) -> FitReport:
    """The fit of a device's rows, with its residuals on other architectures' constants."""
    from validate.fit_report import fit_report
    from validate.transfer import with_transfer

    with patience(f"fitting {device_id}"):
        report = fit_report(
            found.rows, device_id, models=models, donors=donors, left_out=found.left_out
        )
        others = [c for c in donors if c.device_id != device_id]
        (calibration,) = with_transfer((report.calibration,), found.rows, others)
    return replace(report, calibration=calibration)


def document(report: FitReport) -> Mapping[str, Any]:
    """The fit as JSON holds it."""
    return {
        "device": report.calibration.device_id,
        "rows": len(report.calibration.rows),
        "models": list(report.models),
        "left_out": dict(report.left_out),
    }


def print_fit(report: FitReport) -> None:
    """Models, constants, and what was left out."""
    from validate.report import percent

    out, right = show.console(), ("rows", "MAPE %", "bias %", "in 90 %")
    title = f"{report.calibration.device_id}: errors of new timings of the same shapes"
    made = show.table("model", *right, title=title, right=right)
    for m in report.models:
        made.add_row(m.model, f"{m.n:,}", percent(m.mape), percent(m.bias), percent(m.coverage_90))
    out.print(made)
    out.print(show.pairs([line for m in report.models for line in _said(m)]))
    _print_left_out(report.left_out)


def _said(model: Any) -> list[tuple[str, str]]:
    """What was learned of a model's constants, what stayed open, what hit a bound."""
    learned = ", ".join(
        f"{name} {value:.4g} ±{math.expm1(width) * 100:.0f} %"
        for name, (value, width) in model.learned.items()
    )
    said = {"": learned, "unidentified: ": ", ".join(model.open),
            "at bound: ": ", ".join(model.at_bound)}  # fmt: skip
    return [(model.model, f"{word}{names}") for word, names in said.items() if names]


def _print_left_out(left_out: Mapping[str, int]) -> None:
    if not left_out:
        return
    made = show.table("reason", "records", right=("records",), title="left out of the fit")
    for reason, n in sorted(left_out.items(), key=lambda item: -item[1]):
        made.add_row(shown(reason, 200), f"{n:,}")
    show.console().print(made)

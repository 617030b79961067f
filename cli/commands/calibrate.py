"""`ridgeplan calibrate`: fit the kernel models' constants to measured rows of a device."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import show
from cli.files import check_writable, write_all
from cli.progress import patience
from cli.quantity import shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.calibration import Calibration
    from validate.measurement import Measurement
    from validate.transfer import Step

LEAST_ROWS: Final = 10
NOMINAL, BORROWED = "nominal", "borrowed"


def calibrate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RECORDS", help="Records of a profile, or a folder of measurement files."
        ),
    ],
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            "-d",
            metavar="NAME",
            help="Only this device; may repeat. GPU=DEVICE says what a GPU name of records means.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="NAME", help="Only this kernel model; may repeat."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", metavar="N", help="Show what N measurements a model would buy."),
    ] = None,
    prior: Annotated[
        str,
        typer.Option(
            "--prior", help="Where constants start: 'borrowed' from other devices, or 'nominal'."
        ),
    ] = BORROWED,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Write <device>.json files there."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Draw the fit of records as one page."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Fit the kernel models to measured rows, and say what the data could not tell.

    Prints every model's cross-validated error and the constants that the rows leave
    unidentified or push to a bound; of records, also which were left out and why. With --out,
    writes one file a device for `--calibration`, which names its rows: `validate` takes none of
    them as evidence.

    \b
    Examples:
      ridgeplan calibrate h200/ -d h200-sxm --html fit.html --out calibrations/
      ridgeplan calibrate measured/ -d h100-sxm --out calibrations/
      ridgeplan calibrate measured/ -d h100-sxm -m gemm --rows 50
    """
    if prior not in (NOMINAL, BORROWED):
        raise InputError(f"--prior {shown(prior)}: say '{BORROWED}' or '{NOMINAL}'")
    if rows is not None and rows < LEAST_ROWS:
        raise InputError(f"--rows {rows}: too few to fit anything; give at least {LEAST_ROWS}")
    ids = _models(model)
    from validate.record_files import holds_records

    if holds_records(path) and rows is None:
        _records(path, device, ids, prior, out, html, as_json=as_json)
        return
    if html is not None:
        raise InputError("--html draws the fit of records; for tables, see `validate --html`")
    measured = _measured(path, device)
    devices = sorted({r.device_id for r in measured})
    files = _files(out, devices)
    if rows is not None:
        _show_ladder(_ladder(measured, devices, rows, ids), rows, as_json)
        return
    fitted = _fitted(measured, devices, ids, prior)
    if out is not None:
        write_all({files[c.device_id]: _bytes(c) for c in fitted})
    if as_json:
        show.print_json({"calibrations": [_without_rows(c) for c in fitted]})
        return
    _show(fitted)
    for c in fitted if out is not None else ():
        print(f"wrote {files[c.device_id]}")


def _records(
    path: Path,
    device: Sequence[str] | None,
    models: Sequence[str] | None,
    prior: str,
    out: Path | None,
    html: Path | None,
    *,
    as_json: bool,
) -> None:
    """Fit one device's records; the calibration and the page are written together."""
    from cli.charts.picture import asked_for
    from cli.record_fits import document, fitted, print_fit, usable_rows
    from hwmodels.calibration import shipped

    check_writable(asked_for(html, None))
    found, device_id = usable_rows(path, device)
    files = _files(out, [device_id])
    report = fitted(found, device_id, models, shipped() if prior == BORROWED else ())
    contents = {files[device_id]: _bytes(report.calibration)} if files else {}
    if html is not None:
        from cli.charts.fit import page

        with patience("drawing"):
            contents[html] = page(report, data=path.resolve().name).encode()
    write_all(contents)
    if as_json:
        show.print_json(
            {"calibrations": [_without_rows(report.calibration)], "fits": [document(report)]}
        )
        return
    print_fit(report)
    for file in contents:
        print(f"wrote {file}")


def _measured(path: Path, device: Sequence[str] | None) -> list[Measurement]:
    """The believable rows of the asked devices; refused ones are counted on stderr."""
    from cli.readings import read_all
    from hwmodels import catalog
    from validate.record_files import holds_records

    if holds_records(path):
        from cli.record_fits import usable_rows

        return list(usable_rows(path, device)[0].rows)
    wanted = {catalog.device(name).id for name in device or ()}
    with patience(f"reading {shown(path)}"):
        measured = [r for r in read_all(path).rows if not wanted or r.device_id in wanted]
    if not measured:
        names = ", ".join(sorted(wanted))
        raise InputError(f"{shown(path, 200)}: no row of {names}; give a folder that has some")
    return measured


def _models(names: Sequence[str] | None) -> list[str] | None:
    from simulator.kernel_time import registry

    return None if not names else [registry.model(name).name for name in names]


def _files(out: Path | None, devices: Sequence[str]) -> dict[str, Path]:
    if out is None:
        return {}
    if not out.is_dir():
        raise InputError(f"--out {shown(out, 200)}: no such folder; make it first")
    files = {device_id: out / f"{device_id}.json" for device_id in devices}
    check_writable(files.values())
    return files


def _fitted(
    measured: Sequence[Measurement],
    devices: Sequence[str],
    models: Sequence[str] | None,
    prior: str,
) -> list[Calibration]:
    """One calibration a device, devices side by side on all cores, with transfer residuals."""
    from hwmodels.calibration import shipped
    from validate.calibrate import calibrate_all
    from validate.transfer import with_transfer

    donors = shipped() if prior == BORROWED else ()
    with patience(f"fitting {len(devices)} devices"):
        fitted = calibrate_all(measured, devices, models=models, donors=donors)
        kept = [c for c in fitted if c.models]
        if not kept:
            raise InputError("no kernel model has the 20 rows a fit needs; give more rows")
        others = [c for c in donors if c.device_id not in {k.device_id for k in kept}]
        done = with_transfer(kept, measured, others)
    return list(done)


def _ladder(
    measured: Sequence[Measurement],
    devices: Sequence[str],
    rows: int,
    models: Sequence[str] | None,
) -> list[Step]:
    from hwmodels.calibration import shipped
    from validate.transfer import ladder

    steps: list[Step] = []
    for device_id in devices:
        with patience(f"fitting {device_id} on {rows} rows a model"):
            steps += ladder(measured, device_id, rows, models=models, donors=shipped())
    if not steps:
        raise InputError(
            f"--rows {rows}: no kernel model has that many rows and more to hold out; "
            "ask for fewer, or give more measurements"
        )
    return steps


def _bytes(calibration: Calibration) -> bytes:
    from validate.calibrate import as_document

    return (json.dumps(as_document(calibration), indent=1, ensure_ascii=False) + "\n").encode()


def _without_rows(calibration: Calibration) -> dict[str, Any]:
    from validate.calibrate import as_document

    return {k: v for k, v in as_document(calibration).items() if k != "rows"}


def _show(fitted: Sequence[Calibration]) -> None:
    out = show.console()
    right = ("rows", "within, 80 %", "within, 90 %", "elsewhere, 80 %")
    for c in fitted:
        made = show.table("model", *right, title=c.device_id, right=right)
        for name, m in c.models.items():
            pooled = m.residuals["all"]
            elsewhere = "-" if m.transfer is None else _percent(m.transfer.q80)
            made.add_row(
                name, str(m.num_rows), _percent(pooled.q80), _percent(pooled.q90), elsewhere
            )
        out.print(made)
        out.print(show.pairs(list(_flagged(c))))
        out.print()
    out.print(
        "within: 80 or 90 % of rows a fit had not seen lie that close (cross-validation by shape); "
        "elsewhere: predicted from other architectures alone."
    )


def _flagged(calibration: Calibration) -> Iterator[tuple[str, str]]:
    """By model, the constants that the rows left open or pushed to a bound."""
    for name, model in calibration.models.items():
        for status in ("at bound", "unidentified"):
            found = [key for key, c in model.constants.items() if c.status == status]
            if found:
                yield name, f"{status}: {', '.join(found)}"


def _percent(log_width: float) -> str:
    import math

    return f"±{math.expm1(log_width) * 100:.0f} %"


def _show_ladder(steps: Sequence[Step], rows: int, as_json: bool) -> None:
    if as_json:
        show.print_json({"num_rows": rows, "steps": list(steps)})
        return
    right = ("held out", "borrowed", f"{rows} rows", "all rows")
    title = "MAPE on held-out rows, by what was measured"
    made = show.table("device", "model", *right, title=title, right=right)
    for s in steps:
        errors = ["-" if v is None else f"{v * 100:.1f} %"
                  for v in (s.borrowed_mape, s.few_mape, s.all_mape)]  # fmt: skip
        made.add_row(s.device_id, s.model, str(s.num_held_out), *errors)
    show.console().print(made)

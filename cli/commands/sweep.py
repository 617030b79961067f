"""`ridgeplan sweep`: many shapes, several ops or devices."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import options, show
from cli.quantity import seconds_text
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from cli.questions import Over
    from cli.series import Crossover, Series

DEFAULT_DEVICE: Final = "h100-sxm"
MAX_ROWS: Final = 48
CHUNK: Final = 10_000
"""Rows turned into Python objects at a time, so that a million rows stay small in memory."""


def sweep(
    names: options.OpNames,
    over: options.Over,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device", "-d", metavar="NAME", help=f"A device; may repeat ({DEFAULT_DEVICE})."
        ),
    ] = None,
    param: options.Params = None,
    rung: options.Rung = "best",
    best: options.Best = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write every row to this CSV file.")
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option("--parquet", metavar="FILE", help="Write every row to this Parquet file."),
    ] = None,
    html: options.Html = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Ops over a range of one parameter: table, file or chart.

    Several ops or devices are compared; where two lines cross, it says from which value on the
    other is faster.

    \b
    Examples:
      ridgeplan sweep matmul --over m=1:8k:x2 -p n=8k -p k=8k -d h100-sxm -d b200-sxm
      ridgeplan sweep attention flash_attention_2 --over seq=1k:128k:x2 -p heads=32 -p dim=128
      ridgeplan sweep softmax --over rows=1k,4k,64k -p cols=32k --csv rows.csv --out rows.html
    """
    from cli.files import check_writable, write_all
    from cli.progress import patience
    from cli.questions import parse_over
    from cli.series import ask_all, crossovers
    from workloads import registry

    pictures = _pictures(html, out)
    if parquet is not None:
        _require_pyarrow()
    check_writable([f for f in (csv_file, parquet, *pictures) if f is not None])
    swept = parse_over(over, [registry.resolve(name) for name in names])
    with patience("estimating"):
        series = ask_all(names, device or [DEFAULT_DEVICE], param or [], swept, rung, best)
        crossings = crossovers(series)
    contents: dict[Path, bytes] = {}
    if csv_file is not None:
        contents[csv_file] = _csv(series)
    if parquet is not None:
        contents[parquet] = _parquet(series)
    if pictures:
        from cli.charts import sweep as chart
        from cli.charts.picture import rendered

        figure = chart.figure(series, swept, crossings)
        with patience("drawing"):
            contents |= {path: rendered(figure, path.suffix) for path in pictures}
    write_all(contents)
    if as_json:
        show.print_json(_document(series, swept, crossings))
    else:
        _show(series, swept, crossings)
        show.wrote(contents)


def _pictures(html: Path | None, out: Path | None) -> list[Path]:
    from cli.charts.picture import asked_for

    return asked_for(html, out)


def _document(series: list[Series], over: Over, crossings: list[Crossover]) -> dict[str, Any]:
    from cli.series import faster_frac

    return {
        "over": {"param": over.key, "values": over.values},
        "series": [s.document() for s in series],
        "crossovers": crossings,
        "first_faster_frac": faster_frac(series),
    }


def columns_of(s: Series) -> dict[str, Any]:
    """One flat row per value, by column; what CSV and Parquet hold. Lone values are for all."""
    import numpy as np

    from cli.records import record

    r = record(s.estimate)
    swept = dict.fromkeys(s.swept_fields, np.asarray(s.values))
    flat = {"op": s.op_name, "device": s.device_id, "rung": r["rung"], **s.fixed_params(), **swept}
    flat |= s.choices()
    timed = ("seconds", "low_80_s", "high_80_s", "lower_s", "upper_s", "bound", "limit_s")
    flat |= {k: r[k] for k in (*timed, "limit_frac")}
    work = dict(r["work"])
    for key in ("tensor_flops", "needed_tensor_flops"):
        flat |= {f"{key}_{d}": f for d, f in work.pop(key).items()}
    flat |= work
    flat |= {f"{resource}_s": t for resource, t in r["seconds_by_resource"].items()}
    return flat | {f"{level}_bytes": b for level, b in r["bytes_by_level"].items()}


def _csv(series: Sequence[Series]) -> bytes:
    tables = [columns_of(s) for s in series]
    names = list(dict.fromkeys(name for table in tables for name in table))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for s, table in zip(series, tables, strict=True):
        for start in range(0, len(s.values), CHUNK):
            stop = min(start + CHUNK, len(s.values))
            cells = [_cells(table.get(name), start, stop) for name in names]
            writer.writerows(zip(*cells, strict=True))
    return text.getvalue().encode("utf-8")


def _cells(value: Any, start: int, stop: int) -> list[Any]:
    if hasattr(value, "tolist"):  # an array
        listed: list[Any] = value[start:stop].tolist()
        return listed
    return [value] * (stop - start)


def _require_pyarrow() -> None:
    from importlib.util import find_spec

    if find_spec("pyarrow") is None:
        raise InputError("--parquet needs pyarrow; pip install pyarrow, or use --csv")


def _parquet(series: Sequence[Series]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    parts = []
    for s in series:
        cells = {k: _cells(v, 0, len(s.values)) for k, v in columns_of(s).items()}
        parts.append(pyarrow.table(cells))
    table = pyarrow.concat_tables(parts, promote_options="permissive")
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def _show(series: list[Series], over: Over, crossings: list[Crossover]) -> None:
    from cli.series import choices_text, faster_frac, rungs_text

    out = show.console()
    several_devices = len({s.device_id for s in series}) > 1
    picked = _picked_rows(len(over.values))
    for s in series:
        fixed = "  ".join(f"{k}={v}" for k, v in s.fixed_params().items() if v is not None)
        out.print(f"{s.op_name} on {s.device_id}: {fixed}")
    for group in _groups(series):
        heads = [f"{s.op_name} {s.device_id}" if several_devices else s.op_name for s in group]
        chance = faster_frac(series)
        last = () if chance is None else ("first faster",)
        table = show.table(over.key, *heads, *last, right=(over.key, *last))
        for i in picked:
            cells = [f"{_time_text(s, i)}  {s.bound[i]}" for s in group]
            cells += [] if chance is None else [f"{chance[i] * 100:.0f} %"]
            table.add_row(f"{over.values[i]:,}", *cells)
        out.print(table)
    if len(picked) < len(over.values):
        out.print(f"{len(picked)} of {len(over.values):,} rows shown; --csv or --json holds all.")
    for c in crossings:
        out.print(
            f"From {over.key} = {c.value:,.0f} on, {c.faster} is faster than {c.slower} "
            f"on {c.device}"
        )
    for line in choices_text(series, over.key):
        out.print(f"Best for {line}")
    out.print(f"{rungs_text(series)}.")


def _time_text(s: Series, i: int) -> str:
    """The time, and on a predicting rung how far it may be off: '1.2 ms ±8%'."""
    text = seconds_text(float(s.seconds[i]))
    if s.interval is None:
        return text
    return f"{text} ±{(float(s.interval[1][i]) / float(s.seconds[i]) - 1) * 100:.0f}%"


def _picked_rows(number: int) -> list[int]:
    """All rows, or an even selection with both ends where there are too many to read."""
    if number <= MAX_ROWS:
        return list(range(number))
    return [round(i * (number - 1) / (MAX_ROWS - 1)) for i in range(MAX_ROWS)]


def _groups(series: list[Series]) -> list[list[Series]]:
    """As many series beside one another as the width holds (about 19 columns each)."""
    size = max((show.width() - 14) // 20, 1)
    return [series[i : i + size] for i in range(0, len(series), size)]

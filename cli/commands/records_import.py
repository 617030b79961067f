"""`ridgeplan records import`: others' measurements as records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli import show
from cli.files import check_writable, write_all
from cli.options import AsJson
from cli.progress import patience
from cli.quantity import shown
from hwmodels.errors import InputError


def records_import(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A CSV or parquet file, or a folder of them."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")],
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="GPU of parquet rows that name none.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Turn public measurements into records, so that they calibrate as one's own do.

    Reads the CSV schema of published kernel timings (source, gpu, op, dtype, params, latency_us)
    and the parquet tables of aiconfigurator. Rows that cannot be told are counted with the reason.

    \b
    Example:
      ridgeplan records import kernels_gemm.csv --out gemm.jsonl
    """
    from validate.imports import imported
    from validate.record_files import counts

    if not path.exists():
        raise InputError(f"{shown(path, 200)}: no such file or folder")
    check_writable([out])
    with patience(f"reading {shown(path)}"):
        found = imported(path, gpu)
    refused = dict(sorted(found.refused.items(), key=lambda item: -item[1]))
    if not found.records:
        why = next(iter(refused), "it holds no row")
        raise InputError(f"{shown(path, 200)}: nothing to import: {shown(why, 200)}")
    write_all({out: "".join(f"{record.line()}\n" for record in found.records).encode()})
    if as_json:
        show.print_json({"out": str(out), "records": len(found.records), "refused": refused,
                         "gpus": counts(found.records)})  # fmt: skip
        return
    print(f"wrote {len(found.records)} records to {out}")
    for name, count in counts(found.records).items():
        print(f"  {name}: {count}")
    for reason, count in refused.items():
        print(f"ridgeplan: warning: refused {count} rows: {shown(reason, 200)}", file=sys.stderr)

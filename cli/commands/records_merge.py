"""`ridgeplan records merge`: several files of records as one, nothing doubled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import show
from cli.commands.records_show import RecordFiles
from cli.files import check_writable, write_all
from cli.options import AsJson


def records_merge(
    path: RecordFiles,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write the union of files of records: lines that are the same stand in it once.

    Two timings of one case are two lines and both stay. Torn lines are left behind.

    \b
    Example:
      ridgeplan records merge monday/ tuesday/ --out h200.jsonl
    """
    from validate.record_files import counts, merged

    check_writable([out])
    records, doubled = merged(path)
    write_all({out: "".join(f"{record.line()}\n" for record in records).encode()})
    if as_json:
        show.print_json({"out": str(out), "records": len(records), "doubled": doubled,
                         "gpus": counts(records)})  # fmt: skip
        return
    print(f"wrote {len(records)} records to {out}; {doubled} doubled lines left out")
    for gpu, count in counts(records).items():
        print(f"  {gpu}: {count}")

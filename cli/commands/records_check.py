"""`ridgeplan records check`: is a file of records fit to calibrate on?"""

from __future__ import annotations

from dataclasses import asdict

import typer

from cli import show
from cli.commands.records_show import RecordFiles
from cli.options import AsJson
from cli.progress import patience

UNFIT = 2


def records_check(path: RecordFiles, as_json: AsJson = False) -> None:
    """Look files of records over; exit code 2 where one should not be used as it is.

    Errors: a line of another schema, a line that stands twice, a GPU in no catalogue, a time
    faster than the bound. Warnings: half a line left by a killed writer, one case timed twice,
    several GPUs in one file.

    \b
    Example:
      ridgeplan records check h200/
    """
    from validate.record_files import findings, path_of

    with patience("checking records"):
        found = [finding for p in path for finding in findings(path_of(p))]
    bad = [finding for finding in found if finding.error]
    if as_json:
        show.print_json({"fit": not bad, "findings": [asdict(finding) for finding in found]})
    else:
        for f in found:
            where = f.file if f.line is None else f"{f.file}, line {f.line}"
            print(f"{'error' if f.error else 'warning'}: {f.kind}: {where}: {f.text}")
        print(f"{len(bad)} errors, {len(found) - len(bad)} warnings")
    if bad:
        raise typer.Exit(UNFIT)

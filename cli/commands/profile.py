"""`ridgeplan profile`: time the suite's kernels on this machine's GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from cli import show
from cli.options import AsJson


def profile(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for records; made if missing.")
    ],
    suite: Annotated[
        str,
        typer.Option("--suite", help="'quick': ~100 points in 8 minutes; 'full': all in 25."),
    ] = "quick",
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", "-k", metavar="NAME", help="Only this kernel; may repeat."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="N", help="End by then.")
    ] = None,
    points: Annotated[
        int | None, typer.Option("--points", metavar="N", help="At most so many points.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in a folder that holds records.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try what was refused again; with --resume.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", metavar="FILE", help="Answer from records, without a GPU."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time the suite's kernels on this GPU, each checked before it is timed.

    Writes DIR/records.jsonl (a line a timing, on the disk at once), refusals.jsonl (what could
    not be timed, and why) and environment.json. Where nothing is installed, `python -m
    validate.profile` does the same with torch, triton and numpy alone.

    \b
    Examples:
      ridgeplan profile --suite quick --out h200/
      ridgeplan profile --suite full --out h200/ --resume
      ridgeplan records show h200/
    """
    from validate.profile import Options, counts, line_of
    from validate.profile import profile as run

    options = Options(
        suite=suite,
        out=out,
        kernels=tuple(kernel or ()),
        seconds=seconds,
        points=points,
        resume=resume,
        retry=retry,
        replay=replay,
    )
    with _listener() as hear:
        summary = run(options, hear)
    if as_json:
        show.print_json({"out": str(out), **counts(summary)})
        return
    print(line_of({"event": "end", **counts(summary)}))
    print(f"records in {out / 'records.jsonl'}")


class _Hear(Protocol):
    def __call__(self, event: Mapping[str, Any], /) -> None: ...


@contextmanager
def _listener() -> Iterator[_Hear]:
    """A bar with the last result on a terminal; lines where stderr is none."""
    from validate.profile import line_of

    if not sys.stderr.isatty():
        yield lambda event: print(line_of(event), file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, last="starting")

        def hear(event: Mapping[str, Any]) -> None:
            text = line_of(event)
            if event["event"] == "trial":
                progress.update(task, completed=event["number"], total=event["total"], last=text)
            else:
                progress.console.print(text, markup=False, highlight=False)

        yield hear

"""`ridgeplan validate`: predicted against measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import show
from cli.files import check_writable, write_all
from cli.progress import patience
from cli.quantity import shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from validate.compare import Comparison
    from validate.measurement import Readings
    from validate.steps import StepComparison


def validate(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of measurement files, or one file.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    family: Annotated[
        str | None, typer.Option("--family", metavar="F", help="Only this family (e.g. gemm).")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the accuracy record.")
    ] = None,
) -> None:
    """Compare predictions with measured times, by family, GPU, op and number format."""
    if markdown is not None:
        check_writable([markdown])
    with patience(f"comparing {shown(path)}"):
        from validate.compare import compare
        from validate.steps import compare_steps

        readings = _read(path, family)
        comparison = compare(readings.rows, readings.refused)
        steps = compare_steps(readings.rows)
    if markdown is not None:
        write_all({markdown: _markdown(comparison, steps, path, family).encode()})
    if as_json:
        show.print_json(comparison.as_dict() | {"training_steps": steps.as_dict()})
    else:
        _print_steps(steps)
        _print(comparison)


def _read(path: Path, family: str | None) -> Readings:
    """All readable files; the unreadable ones are named on stderr unless there are no others."""
    from validate.measurement import Readings, csv_files, read

    readings, errors = Readings(), []
    for file in csv_files(path, family):
        try:
            readings += read(file)
        except InputError as error:
            errors.append(str(error))
    if not readings.rows and not readings.refused:
        more = f" (and {len(errors) - 1} more such files)" if len(errors) > 1 else ""
        raise InputError(f"{errors[0]}{more}")
    for message in errors:
        print(f"ridgeplan: warning: left out: {shown(message, 2000)}", file=sys.stderr)
    if readings.refused:
        first = readings.refused[0]
        print(
            f"ridgeplan: warning: refused {len(readings.refused)} rows; the first is "
            f"{shown(first.file, 200)}, line {first.line}: {shown(first.reason, 200)}",
            file=sys.stderr,
        )
    return readings


def _markdown(
    comparison: Comparison, steps: StepComparison, path: Path, family: str | None
) -> str:  # fmt: skip
    import datetime

    from hwmodels.step_ratios import shipped_ratios
    from validate.report import accuracy_markdown, steps_markdown

    name = path.resolve().name
    chosen = f" --family {family}" if family else ""
    command = f"ridgeplan validate {name}{chosen} --markdown FILE"
    section = steps_markdown(steps, shipped_ratios()) if steps.num_rows else ""
    return accuracy_markdown(
        comparison, on=datetime.date.today(), data=name, command=command, steps=section
    )


def _print_steps(steps: StepComparison) -> None:
    """Measured over bound of whole training steps, and how well the shipped ratios fit."""
    from validate.report import percent

    if steps.overall is None:
        return
    numbers = ("runs", "median", "p10", "p90", "least", "fast", "unseen", "MAPE %", "in 80 %")
    made = show.table("source", "GPU", *numbers, title="training steps: measured / bound",
                      right=numbers)  # fmt: skip
    made.padding = (0, 1, 0, 0)
    for t in (*steps.tables, steps.overall):
        ratios = [f"{r:.2f}" for r in (t.median, t.p10, t.p90, t.least)]
        counts = [str(t.faster_than_bound), str(t.n_unseen)]
        errors = [percent(t.mape), percent(t.coverage_80)]
        made.add_row(shown(t.source, 20), shown(t.gpu, 24), str(t.n), *ratios, *counts, *errors)
    show.console().print(made)


def _print(comparison: Comparison) -> None:
    from validate.report import percent, reason_counts

    out = show.console()
    numbers = ("n", "MAPE", "median", "p90", "bias", "fast/warm")
    for family in dict.fromkeys(t.family for t in comparison.tables):
        predicted = [t for t in comparison.tables if t.family == family and t.n]
        title = f"{shown(family)}: errors in %"
        made = show.table("GPU", "op", "dtype", *numbers, title=title, right=numbers)
        made.padding = (0, 1, 0, 0)
        for t in predicted:
            errors = [percent(v) for v in (t.mape, t.median_ape, t.p90_ape, t.bias)]
            identity = [shown(text, 30) for text in (t.gpu, t.op, t.dtype)]
            faster = f"{t.faster_than_bound}/{t.faster_than_bound_warm}"
            made.add_row(*identity, str(t.n), *errors, faster)
        if predicted:
            out.print(made)
    counts = reason_counts(comparison)
    if counts:
        columns = ("family", "reason", "rows")
        made = show.table(*columns, title="without a prediction", right=("rows",))
        for family, reason, n in counts:
            made.add_row(shown(family, 30), shown(reason, 200), str(n))
        out.print(made)
    n, without = (sum(getattr(t, k) for t in comparison.tables) for k in ("n", "unsupported"))
    out.print(
        f"{n + without} rows: {n} predicted, {without} without. Rung {comparison.rung}: a lower "
        "bound for cold kernels; 'fast' rows beat it, a warm L2 explains the 'warm' ones."
    )

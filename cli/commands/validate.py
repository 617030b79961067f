"""`ridgeplan validate`: predicted against measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from cli import given, show
from cli.files import check_writable, write_all
from cli.options import AsJson
from cli.progress import patience
from cli.quantity import shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.calibration import Calibration
    from validate.collective_cells import CollectiveCell
    from validate.compare import Ablation, Comparison, Table
    from validate.measurement import Readings
    from validate.peak_memory import PeakComparison
    from validate.plan_ranking import Ranking
    from validate.serving import ServingComparison
    from validate.step_accuracy import StepAccuracy
    from validate.steps import StepComparison

Counters: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--counters", metavar="PATH", help="Lay counted bytes beside hardware counters, in place "
        "of times (see python -m validate.counters).",
    ),
]  # fmt: skip
SCOPE_WORDS: Final[Mapping[str, str]] = {"architecture": "arch"}
"""Scopes as they stand in a narrow column."""
MOST_FRAC: Final = 99.99
"""The largest error a narrow column states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What was compared of whole steps (training, serving, memory), and collectives by group."""

    steps: StepComparison
    accuracy: Sequence[StepAccuracy]
    serving: ServingComparison
    peaks: PeakComparison
    collectives: Sequence[CollectiveCell] = ()
    rankings: Sequence[Ranking] = ()

    def as_dict(self) -> dict[str, object]:
        """The JSON document's part."""
        from validate.collective_cells import as_dicts as as_cells
        from validate.plan_ranking import as_dicts as as_rankings
        from validate.step_accuracy import as_dicts

        return {
            "training_steps": self.steps.as_dict() | {"model": as_dicts(self.accuracy)},
            "serving_steps": self.serving.as_dict(),
            "peak_memory": self.peaks.as_dict(),
            "collective_cells": as_cells(self.collectives),
            "plan_ranking": as_rankings(self.rankings),
        }

    def show(self) -> None:
        """All of it as tables."""
        _print_steps(self.steps)
        _print_accuracy(self.accuracy)
        _print_rankings(self.rankings)
        _print_serving(self.serving)
        _print_peaks(self.peaks)
        _print_collectives(self.collectives)


def validate(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR", help="A folder of measurement files, one file, or a profile's records."
        ),
    ] = None,
    as_json: AsJson = False,
    family: Annotated[
        str | None, typer.Option("--family", metavar="F", help="Only this family (e.g. gemm).")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the accuracy record.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Draw parity and residuals as one page."),
    ] = None,
    calibration: given.Calibrations = None,
    device: given.Devices = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Show what each step of calibration is worth.")
    ] = False,
    counters: Counters = None,
) -> None:
    """Compare predictions with measured times, by family, GPU, op and number format.

    Every row is predicted or counted with the reason why not; rows that a calibration was fitted
    on are no evidence for it and are counted as such.

    \b
    Examples:
      ridgeplan validate measured/ --html accuracy.html
      ridgeplan validate measured/ --family gemm --ablation
      ridgeplan validate h200/ --calibration calibrations/h200-sxm.json
      ridgeplan validate measured/ --device 'My GPU=./my-gpu.toml'
      ridgeplan validate --counters h200/
    """
    if counters is not None:
        from cli.counter_tables import show_counters

        show_counters(counters, as_json=as_json)
        return
    if path is None:
        raise InputError("nothing to compare: give a folder of measurements, or --counters PATH")
    from cli.charts.picture import asked_for

    check_writable([f for f in (markdown, *asked_for(html, None)) if f is not None])
    targets = given.devices(device)
    calibrations = given.calibrations(calibration, targets)
    with patience(f"comparing {shown(path)}"):
        from validate.compare import compare

        readings = _read(path, family, targets)
        comparison = compare(readings.rows, readings.refused, calibrations)
        steps_found = _compare_whole(readings, calibrations)
        steps_of_calibration = _ablation(readings, calibrations) if ablation else ()
    contents: dict[Path, bytes] = {}
    if markdown is not None:
        text = _markdown(comparison, steps_found, steps_of_calibration, path, family)
        contents[markdown] = text.encode()
    if html is not None:
        with patience("drawing"):
            contents[html] = _page(comparison, path)
    write_all(contents)
    if as_json:
        found = comparison.as_dict() | steps_found.as_dict() | {"families": _families(comparison)}
        show.print_json(found | ({"ablation": steps_of_calibration} if ablation else {}))
        return
    steps_found.show()
    _print(comparison)
    _print_families(comparison)
    _print_ablation(steps_of_calibration)
    for file in contents:
        print(f"wrote {file}")


def _families(comparison: Comparison) -> list[dict[str, object]]:
    """Errors by family and GPU, all ops and formats together."""
    from dataclasses import asdict

    from validate.compare import errors

    groups = comparison.points.groups("family", "gpu")
    return [{"family": f, "gpu": g} | asdict(errors(mine)) for (f, g), mine in groups.items()]


def _print_families(comparison: Comparison) -> None:
    """One line a family and GPU, where there are several tables of it."""
    from validate.report import percent

    found = _families(comparison)
    if len(found) == len([t for t in comparison.tables if t.n]):
        return
    numbers = ("n", "MAPE", "bias", "in 80", "in 90")
    made = show.table("family", "GPU", *numbers, title="families: errors in %", right=numbers)
    made.padding = (0, 1, 0, 0)
    for e in found:
        keys = ("mape", "bias", "coverage_80", "coverage_90")
        values = [percent(v if isinstance(v := e[key], float) else None) for key in keys]
        made.add_row(shown(str(e["family"]), 30), shown(str(e["gpu"]), 30), str(e["n"]), *values)
    show.console().print(made)


def _compare_whole(readings: Readings, calibrations: Sequence[Calibration] | None) -> Whole:
    """Everything that is held against whole steps, and collectives by kind of group."""
    from validate.collective_cells import collective_cells
    from validate.moe_accuracy import moe_accuracy
    from validate.peak_memory import compare_peaks
    from validate.plan_ranking import plan_ranking
    from validate.serving import compare_serving
    from validate.step_accuracy import published_accuracy, step_accuracy
    from validate.steps import compare_steps

    accuracy = step_accuracy(readings.rows)
    return Whole(
        steps=compare_steps(readings.rows),
        accuracy=(
            *accuracy,
            *(published_accuracy() if accuracy else ()),
            *moe_accuracy(readings.rows),
        ),
        serving=compare_serving(readings.rows),
        peaks=compare_peaks(readings.rows),
        collectives=collective_cells(readings.rows, calibrations),
        rankings=plan_ranking(readings.rows),
    )


def _read(path: Path, family: str | None, targets: Mapping[str, str]) -> Readings:
    from cli.readings import read_all, record_readings, unknown_gpu_hint
    from validate.record_files import holds_records

    read = record_readings if holds_records(path) else read_all
    readings = read(path, family, targets)
    hint = unknown_gpu_hint(readings.refused)
    if hint:
        print(f"ridgeplan: hint: {hint}", file=sys.stderr)
    return readings


def _ablation(
    readings: Readings, calibrations: Sequence[Calibration] | None
) -> tuple[Ablation, ...]:
    from validate.compare import ablate

    return ablate(readings.rows, calibrations)


def _page(comparison: Comparison, path: Path) -> bytes:
    import datetime

    from cli.charts.accuracy import page

    return page(comparison, data=path.resolve().name, on=datetime.date.today()).encode()


def _markdown(
    comparison: Comparison,
    whole: Whole,
    ablation: Sequence[Ablation],
    path: Path,
    family: str | None,
) -> str:
    import datetime

    from hwmodels.step_ratios import shipped_ratios
    from validate.collective_report import collectives_markdown
    from validate.report import (
        accuracy_markdown,
        peaks_markdown,
        step_model_markdown,
        steps_markdown,
    )
    from validate.serving_report import serving_markdown

    steps, serving = whole.steps, whole.serving
    name = path.resolve().name
    chosen = f" --family {family}" if family else ""
    more = " --ablation" if ablation else ""
    sections: list[str] = []
    if steps.num_rows:
        model = step_model_markdown(whole.accuracy)
        sections.append(_steps_text(steps_markdown(steps, shipped_ratios()), model))
    if serving.num_rows:
        sections.append(serving_markdown(serving))
    if whole.peaks.num_rows:
        sections.append(peaks_markdown(whole.peaks))
    if whole.collectives:
        sections.append(collectives_markdown(whole.collectives))
    return accuracy_markdown(
        comparison,
        on=datetime.date.today(),
        data=name,
        command=f"ridgeplan validate {name}{chosen}{more} --markdown FILE",
        steps="\n\n".join(sections),
        ablation=ablation,
    )


def _steps_text(bound: str, model: str) -> str:
    return f"{bound}\n{model}" if model else bound


def _print_accuracy(tables: Sequence[StepAccuracy]) -> None:
    """Errors of the calibrated step by source and GPU."""
    from validate.report import percent

    if not tables:
        return
    numbers = ("n", "MAPE", "max", "bias", "in 80", "left out", "MFU", "assumed")
    made = show.table("source", "GPU", *numbers, right=numbers,
                      title="training steps, calibrated: errors in %")  # fmt: skip
    made.padding = (0, 1, 0, 0)
    for t in tables:
        values = (t.mape, t.max_ape, t.bias, t.coverage_80, t.left_out_mape, t.mfu_mape)
        identity = shown(t.source, 44), _device_id(t.gpu)
        made.add_row(*identity, str(t.n), *map(percent, values), str(t.assumed))
    show.console().print(made)
    show.console().print(
        "left out: the table's error where the factors were fitted without it; MFU: one constant "
        "share of peak; assumed: runs with a size that nobody published"
    )


def _print_rankings(rankings: Sequence[Ranking]) -> None:
    """A line each; those without two alternatives have none."""
    from validate.plan_ranking import line

    for ranking in rankings:
        if ranking.groups:
            show.console().print(line(ranking))


def _device_id(label: str) -> str:
    """The catalogue's short name of a published GPU; the label where there is none."""
    from hwmodels import catalog

    try:
        return catalog.device(label).id
    except InputError:
        return shown(label, 16)


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


def _print_peaks(peaks: PeakComparison) -> None:
    """Peak memory of training steps, predicted over measured."""
    from validate.report import percent

    if not peaks.predictions:
        return
    columns = ("source", "GPU", "model", "plan", "off %")
    made = show.table(*columns, title="peak memory of training steps", right=("off %",))
    for p in peaks.predictions:
        row = p.run.row
        made.add_row(shown(row.source, 26), shown(row.gpu, 24), shown(p.run.config.name, 20),
                     str(p.run.plan), percent(p.ratio - 1))  # fmt: skip
    show.console().print(made)


def _print_collectives(cells: Sequence[CollectiveCell]) -> None:
    """Errors of collectives by GPU and kind of group, large payloads only."""
    from validate.collective_cells import LEAST_BYTES, LIMIT_FRAC
    from validate.report import percent

    if not cells:
        return
    numbers = ("n", "MAPE", "median", "bias", "in 80")
    title = (f"collectives of {LEAST_BYTES // 1024} KB and more: errors in %, "
             f"bar {percent(LIMIT_FRAC)}")  # fmt: skip
    made = show.table("GPU", "group", *numbers, "bar", right=numbers, title=title)
    made.padding = (0, 1, 0, 0)
    words = {None: "", True: "kept", False: "missed"}
    for c in cells:
        errors = [percent(v) for v in (c.mape, c.median_ape, c.bias, c.coverage_80)]
        made.add_row(shown(c.gpu, 28), c.kind, str(c.n), *errors, words[c.kept])
    show.console().print(made)


def _print_serving(serving: ServingComparison) -> None:
    """Errors of serving figures by model, and their totals by family."""
    from validate.report import percent

    if not serving.num_rows:
        return
    numbers = ("n", "MAPE", "median", "p90", "bias")
    made = show.table("metric", "family", "GPU", "engine", "model", *numbers, right=numbers,
                      title="serving: errors in %")  # fmt: skip
    made.padding = (0, 1, 0, 0)
    for t in (*serving.tables, *serving.totals):
        errors = [percent(v) for v in (t.mape, t.median, t.p90, t.bias)]
        engine = t.engine if t.mode in ("agg", "all") else f"{t.engine}, {t.mode}"
        names = (t.metric, shown(t.family, 14), shown(t.gpu, 10), engine, shown(t.model, 18))
        made.add_row(*names, str(t.n), *errors)
    if serving.tables:
        show.console().print(made)
    if serving.reasons:
        title = "serving: without a prediction"
        others = show.table("metric", "reason", "rows", right=("rows",), title=title)
        for metric, reason, n in serving.reasons:
            others.add_row(metric, shown(reason, 200), str(n))
        show.console().print(others)


def _print(comparison: Comparison) -> None:
    out = show.console()
    for family, op in dict.fromkeys((t.family, t.op) for t in comparison.tables if t.n):
        chosen = [t for t in comparison.tables if (t.family, t.op) == (family, op) and t.n]
        _print_op(f"{shown(family)}, {shown(op, 80)}: errors in %", chosen)
    _print_reasons(comparison)
    n, without, flagged, faster, warm = (
        sum(getattr(t, k) for t in comparison.tables)
        for k in ("n", "unsupported", "flagged", "faster_than_bound", "faster_than_bound_warm")
    )
    out.print(
        f"{n + without} rows: {n} predicted, {without} without. 'roof': the error of the roofline "
        "on the same rows; 'in 80', 'in 90': how many rows the interval holds; 'from': whose "
        "constants (own, the architecture's, the mean of all, or nominal)."
    )
    if flagged:
        out.print(f"* {flagged} rows were recognised by the sizes they state alone.")
    if faster:
        out.print(f"{faster} rows beat the bound of a cold kernel; a warm L2 explains {warm}.")


def _print_op(title: str, tables: Sequence[Table]) -> None:
    """One op of a family by GPU and number format."""
    numbers = ("n", "MAPE", "median", "p90", "bias", "in 80", "in 90", "roof")
    made = show.table("GPU", "dtype", *numbers, "from", right=numbers, title=title)
    made.padding = (0, 1, 0, 0)
    for column in made.columns[2:-1]:
        column.no_wrap = True
    for t in tables:
        values = (t.mape, t.median_ape, t.p90_ape, t.bias, t.coverage_80, t.coverage_90,
                  t.roofline_mape)  # fmt: skip
        scopes = [SCOPE_WORDS.get(s, s) for s in (t.scope or "").split("+")]
        count = f"{t.n}{'*' if t.flagged else ''}"
        identity = shown(t.gpu, 30), shown(t.dtype, 30)
        made.add_row(*identity, count, *map(_narrow, values), "+".join(scopes))
    show.console().print(made)


def _narrow(frac: float | None) -> str:
    """A percentage of at most six letters."""
    from validate.report import percent

    return ">9999" if frac is not None and frac > MOST_FRAC else percent(frac)


def _print_reasons(comparison: Comparison) -> None:
    from validate.report import reason_counts

    counts = reason_counts(comparison)
    if not counts:
        return
    columns = ("family", "reason", "rows")
    made = show.table(*columns, title="without a prediction", right=("rows",))
    for family, reason, n in counts:
        made.add_row(shown(family, 30), shown(reason, 200), str(n))
    show.console().print(made)


def _print_ablation(found: Sequence[Ablation]) -> None:
    """What each step of calibration is worth, by family and GPU."""
    from validate.report import percent

    if not found:
        return
    numbers = ("n", "roofline", "nominal", "borrowed", "all")
    title = "MAPE in % on the same rows, by what the constants rest on"
    made = show.table("family", "GPU", *numbers, title=title, right=numbers)
    for a in found:
        steps = (percent(v) for v in (a.bound, a.nominal, a.borrowed, a.best))
        made.add_row(shown(a.family, 24), shown(a.gpu, 30), str(a.n), *steps)
    show.console().print(made)

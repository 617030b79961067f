"""A comparison as Markdown: the accuracy record that stands in the documentation."""

from __future__ import annotations

import datetime
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hwmodels.step_ratios import StepRatios
from simulator.kernel_time.basis import NOMINAL, OWN
from validate.bars import (
    BIAS_FRAC,
    COVERAGE_FRAC,
    FITTED,
    MAPE,
    MIN_COVERAGE,
    NEW,
    Verdict,
    noise_floor,
    verdicts,
)
from validate.compare import Ablation, Comparison, Points, Table, errors
from validate.peak_memory import PeakComparison
from validate.step_accuracy import StepAccuracy
from validate.steps import StepComparison, StepTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """The tables of one family on one GPU added up; fractions, None where nothing was predicted."""

    family: str
    gpu: str
    n: int
    unsupported: int
    mape: float | None
    bias: float | None
    faster_cold: int
    faster_warm: int


def totals(tables: Iterable[Table]) -> tuple[Total, ...]:
    """Tables added up over ops and dtypes; MAPE and bias weighted by rows, which is exact."""
    members: dict[tuple[str, str], list[Table]] = defaultdict(list)
    for table in tables:
        members[table.family, table.gpu].append(table)
    return tuple(
        _total(family, gpu, tables) for (family, gpu), tables in sorted(members.items())
    )  # fmt: skip


def _total(family: str, gpu: str, tables: Sequence[Table]) -> Total:
    n = sum(t.n for t in tables)
    apes = [t.n * t.mape for t in tables if t.mape is not None]
    logs = [t.n * math.log1p(t.bias) for t in tables if t.bias is not None]
    return Total(
        family=family,
        gpu=gpu,
        n=n,
        unsupported=sum(t.unsupported for t in tables),
        mape=sum(apes) / n if n else None,
        bias=math.expm1(sum(logs) / n) if n else None,
        faster_cold=sum(t.faster_than_bound - t.faster_than_bound_warm for t in tables),
        faster_warm=sum(t.faster_than_bound_warm for t in tables),
    )


def accuracy_markdown(
    comparison: Comparison,
    *,
    on: datetime.date,
    data: str,
    command: str = "",
    steps: str = "",
    ablation: Sequence[Ablation] = (),
) -> str:
    """The whole document: what was promised and kept, errors by cell, rows without a prediction.

    `steps` is the section of `steps_markdown`, or nothing.
    """
    predicted = len(comparison.points)
    without = sum(t.unsupported for t in comparison.tables)
    lines = [
        "# Accuracy",
        "",
        f"{on.isoformat()}, rung **{comparison.rung}**, published measurements `{data}`: "
        f"{predicted + without} rows, {predicted} predicted, {without} without a prediction.",
        "",
        *_how_to_read(),
        *_bars(verdicts(comparison.points)),
        *_cells(comparison),
        *_ablation(ablation),
        *_faster(totals(comparison.tables)),
        *_reasons(comparison),
    ]
    if steps:
        lines += ["", steps]
    if command:
        lines += ["", f"Written by `{command}`."]
    return "\n".join(lines) + "\n"


def _how_to_read() -> Iterator[str]:
    """What the figures mean, and which of their digits are noise."""
    yield (
        "MAPE is the mean of |predicted - measured| / measured, over rows that no calibration was "
        "fitted on; bias is exp(mean(log(predicted / measured))) - 1; *in 80 %*, *in 90 %* are the "
        "shares of rows inside the interval of that level. *Roofline* is the MAPE of the bound "
        "rung on the same rows: a floor under the time, not a prediction of it. *Constants* says "
        "whose they are: the device's own, borrowed from others of its architecture, or the mean "
        "over all calibrated devices."
    )
    yield ""
    yield (
        "*Noise* is the floor under any error: how far repeated measurements of one shape on one "
        "GPU lie from their median, on average. It is known for bf16 GEMM, which several "
        "frameworks timed: 3.7 to 4.6 % by GPU, and 5 to 8 % where one framework's time is taken "
        "as a prediction of another's. Elsewhere nobody repeated the measurement and the column "
        "says ?; a difference of less than about 4 % means nothing there either. Of NCCL it is "
        "known that the longest and the shortest of repeated times differ by less than 14 % in 95 "
        "of 100 cases."
    )
    yield ""


def _bars(found: Sequence[Verdict]) -> Iterator[str]:
    """What was promised, cell by cell."""
    if not found:
        return
    met = sum(MAPE not in v.missed for v in found)
    yield "## Promised and kept"
    yield ""
    yield (
        f"{met} of {len(found)} cells keep their bar on MAPE, "
        f"{sum(not v.missed for v in found)} keep everything: a signed bias within "
        f"{100 * BIAS_FRAC:.0f} % where the GPU was fitted, also over the tenth of the rows with "
        f"the largest bound (*at size*), and from {MIN_COVERAGE} rows on a coverage within "
        f"{100 * COVERAGE_FRAC[FITTED]:.0f} points of its level "
        f"({100 * COVERAGE_FRAC[NEW]:.0f} on new architectures)."
    )
    yield ""
    yield (
        "| bar | GPU | known as | n | MAPE % | bar % | noise % | bias % | at size % | in 80 % "
        "| in 90 % | missed |"
    )
    yield "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"
    for v in found:
        e = v.errors
        shares = (e.bias, v.largest_bias, e.coverage_80, e.coverage_90)
        yield (
            f"| {v.bar} | {_cell(v.gpu)} | {v.kind} | {e.n} | {percent(e.mape)} | "
            f"{percent(v.limit)} | {_noise(v.noise_floor)} | {' | '.join(map(percent, shares))} | "
            f"{', '.join(v.missed)} |"
        )
    yield ""


def _cells(comparison: Comparison) -> Iterator[str]:
    """Errors by family, GPU and number format, exact over the ops in a cell."""
    without: Counter[tuple[str, ...]] = Counter()
    for table in comparison.tables:
        without[table.family, table.gpu, table.dtype] += table.unsupported
    yield "## By family, GPU and number format"
    yield ""
    yield (
        "| family | GPU | dtype | n | without | roofline % | MAPE % | noise % | median % | p90 % "
        "| bias % | in 80 % | in 90 % | constants |"
    )
    yield "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|"
    for key, points in comparison.points.groups("family", "gpu", "dtype").items():
        e = errors(points)
        shares = (e.median_ape, e.p90_ape, e.bias, e.coverage_80, e.coverage_90)
        yield (
            f"| {' | '.join(map(_cell, key))} | {e.n} | {without[key]} | "
            f"{percent(e.roofline_mape)} | {percent(e.mape)} | {_noise(noise_floor(points))} | "
            f"{' | '.join(map(percent, shares))} | {constants_text(points)} |"
        )


def constants_text(points: Points) -> str:
    """Whose constants the predictions rest on: 'own', or how they were borrowed and from whom."""
    scope, donors = points.joined("scope") or "", points.joined("calibration") or ""
    if scope in (OWN, NOMINAL):
        return scope
    names = donors.split("+")
    listed = ", ".join(names) if len(names) <= 3 else f"{len(names)} devices"
    return f"{scope.replace('+', ', ')} ({listed})"


def _ablation(found: Sequence[Ablation]) -> Iterator[str]:
    """What each step of calibration is worth."""
    if not found:
        return
    yield ""
    yield "## What calibration buys"
    yield ""
    yield (
        "MAPE on the same rows: the roofline, the kernel model with constants nobody fitted, with "
        "constants of other devices only, and with all there is."
    )
    yield ""
    yield "| family | GPU | n | roofline % | nominal % | borrowed % | all % |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for a in found:
        steps = " | ".join(percent(v) for v in (a.bound, a.nominal, a.borrowed, a.best))
        yield f"| {_cell(a.family)} | {_cell(a.gpu)} | {a.n} | {steps} |"


def _faster(rows: Sequence[Total]) -> Iterator[str]:
    """Rows measured faster than the bound."""
    found = [t for t in rows if t.faster_cold or t.faster_warm]
    if not found:
        return
    yield ""
    yield "## Faster than the bound"
    yield ""
    yield (
        "The bound holds for a cold kernel. *Warm* rows are explained by a replay that finds up to "
        "one L2 full of its bytes in the L2; *cold* ones by nothing: each is a question to the "
        "bound or to the row."
    )
    yield ""
    yield "| family | GPU | cold | warm |"
    yield "|---|---|--:|--:|"
    for t in found:
        yield f"| {_cell(t.family)} | {_cell(t.gpu)} | {t.faster_cold} | {t.faster_warm} |"


def _noise(floor: float | None) -> str:
    return "?" if floor is None else percent(floor)


def _cell(text: str) -> str:
    """A text of the data as it may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;")


def step_model_markdown(tables: Sequence[StepAccuracy]) -> str:
    """The section on the calibrated step: errors by source and GPU; nothing without tables."""
    if not tables:
        return ""
    lines = [
        "",
        "### The calibrated step",
        "",
        "Kernels as the framework runs them (`simulator.stack`), fitted factors, errors in %. "
        "*Left out*: fitted without this table's runs. *Fitted*: runs that the factors have "
        "seen. *Assumed*: runs whose rows leave the plan open in part (`validate.trainers`). "
        "*MFU*: the error of one share of the peak for all runs of a device.",
        "",
        "| source | GPU | n | MAPE | median | max | bias | in 80 | left out | MFU | fitted "
        "| assumed |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for t in tables:
        values = (t.mape, t.median_ape, t.max_ape, t.bias, t.coverage_80, t.left_out_mape,
                  t.mfu_mape)  # fmt: skip
        shown = " | ".join(percent(v) for v in values)
        lines.append(
            f"| {_cell(t.source)} | {_cell(t.gpu)} | {t.n} | {shown} | {t.fitted} | {t.assumed} |"
        )
    return "\n".join(lines) + "\n"


def peaks_markdown(found: PeakComparison) -> str:
    """The section on peak memory: errors by source, GPU and model; the other rows by reason."""
    told = found.summary()
    lines = ["## Peak memory of training steps", ""]
    if told["n"]:
        lines += [
            "A replay of the trainer's allocations, nothing fitted: MAPE "
            f"{percent(told['mape'])} % over {told['n']} runs, largest {percent(told['max'])} %, "
            f"bias {percent(told['bias'])} %, {percent(told['within_frac'])} % within 10 %.",
            "",
            "| source | GPU | model | plan | off % |",
            "|---|---|---|---|---:|",
        ]
    for p in found.predictions:
        row = p.run.row
        names = " | ".join(map(_cell, (row.source, row.gpu, p.run.config.name, str(p.run.plan))))
        lines.append(f"| {names} | {percent(p.ratio - 1)} |")
    lines += ["", *(f"- {n} rows without a prediction: {reason}" for reason, n in found.reasons)]
    return "\n".join(lines).rstrip() + "\n"


def steps_markdown(comparison: StepComparison, ratios: StepRatios | None = None) -> str:
    """The section on training steps: ratios to the bound, errors on unseen runs, other rows."""
    tables = comparison.tables
    lines = [
        "## Training steps",
        "",
        f"{comparison.num_rows} rows state {sum(t.n for t in tables)} runs whose step the bound "
        "rung can price. *Ratio* is measured seconds over bound-rung seconds: a real step launches "
        "kernels one by one, at less than peak clocks and bandwidth, and waits for exchange. "
        "*Faster* counts runs that beat the kernels' lower bound with all exchange hidden; one "
        "would be a defect of the bound.",
        "",
        *_ratio_rows(tables),
    ]
    held = [t for t in tables if t.n_unseen]
    if ratios is not None and held and comparison.overall is not None:
        names = ", ".join((*ratios.devices, *ratios.architectures))
        lines += [
            "",
            f"Held against the ratios fitted on {ratios.date.isoformat()} on other rows (sha256 "
            f"`{ratios.rows_digest[:16]}`; {names}), which say what `bound x median` predicts and "
            "that four runs of five lie in [bound x p10, bound x p90]. Most of the rows fitted on "
            "train MPT under FSDP on 8 to 64 GPUs; plans unlike those are extrapolated.",
            "",
            *_ratio_errors((*held, comparison.overall)),
        ]
    if comparison.reasons:
        lines += ["", "| training rows that state no such run | rows |", "|---|--:|"]
        lines += [f"| {reason.replace('|', '/')} | {n} |" for reason, n in comparison.reasons]
    return "\n".join(lines)


def _ratio_rows(tables: Iterable[StepTable]) -> Iterator[str]:
    yield "| source | GPU | runs | ratio: median | p10 | p90 | least | faster |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for t in tables:
        ratios = " | ".join(f"{r:.2f}" for r in (t.median, t.p10, t.p90, t.least))
        yield f"| {t.source} | {t.gpu} | {t.n} | {ratios} | {t.faster_than_bound} |"


def _ratio_errors(tables: Iterable[StepTable]) -> Iterator[str]:
    yield (
        "| source | GPU | unseen runs | ratio of the same | bound: MAPE % | bound x median: MAPE % "
        "| in [p10, p90] % |"
    )
    yield "|---|---|--:|---|--:|--:|--:|"
    for t in tables:
        errors = " | ".join(percent(v) for v in (t.bound_mape, t.mape, t.coverage_80))
        yield f"| {t.source} | {t.gpu} | {t.n_unseen} | {t.scope} | {errors} |"


def percent(frac: float | None) -> str:
    """A fraction as a percentage with one decimal; a dash where there is none.

    >>> percent(0.0425), percent(None)
    ('4.2', '-')
    """
    return "-" if frac is None else f"{100 * frac:.1f}"


def _reasons(comparison: Comparison) -> Iterator[str]:
    counted = reason_counts(comparison)
    if not counted:
        return
    yield ""
    yield "## Rows without a prediction"
    yield ""
    yield "| family | reason | rows |"
    yield "|---|---|--:|"
    for family, reason, n in counted:
        yield f"| {_cell(family)} | {_cell(reason)} | {n} |"


def reason_counts(comparison: Comparison) -> list[tuple[str, str, int]]:
    """Rows without a prediction by family and reason, most frequent first within a family."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for u in comparison.unsupported:
        counts[u.family, u.reason] += u.n
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    return [(family, reason, n) for (family, reason), n in ordered]

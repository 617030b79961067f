"""A comparison as Markdown: the accuracy record that stands in the documentation."""

from __future__ import annotations

import datetime
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hwmodels.step_ratios import StepRatios
from validate.compare import Comparison, Table
from validate.steps import StepComparison, StepTable

NOISE_FLOOR = "4-8 %"
"""Repeated measurements of one kernel on one GPU by different people differ by this much."""


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
) -> str:
    """The whole document: what was compared, errors by family and GPU, rows without a count.

    `steps` is the section of `steps_markdown`, or nothing.
    """
    rows = totals(comparison.tables)
    predicted = sum(t.n for t in rows)
    without = sum(t.unsupported for t in rows)
    lines = [
        "# Accuracy",
        "",
        f"{on.isoformat()}, rung **{comparison.rung}**, published measurements `{data}`: "
        f"{predicted + without} rows, {predicted} predicted, {without} without a prediction.",
        "",
        "The bound rung is a lower bound on the time of a cold kernel, not a prediction of it: no "
        "launch latency, occupancy, waves or ramps. A negative bias is its nature, and its error "
        "is the distance a model has to close. Repeated measurements of one kernel on one GPU by "
        f"different people differ by {NOISE_FLOOR}; no error below that means anything.",
        "",
        "MAPE is the mean of |predicted - measured| / measured; bias is "
        "exp(mean(log(predicted / measured))) - 1. *Faster* counts rows measured faster than the "
        "bound: the *warm* ones a replay explains that finds up to one L2 full of its bytes in the "
        "L2, the *cold* ones nothing explains: each is a question to the bound or to the row.",
        "",
    ]
    lines += _errors(t for t in rows if t.n)
    lines += _reasons(comparison)
    if steps:
        lines += ["", steps]
    if command:
        lines += ["", f"Written by `{command}`."]
    return "\n".join(lines) + "\n"


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


def _errors(rows: Iterable[Total]) -> Iterator[str]:
    yield "## By family and GPU"
    yield ""
    yield "| family | GPU | predicted | without | MAPE % | bias % | faster, cold | faster, warm |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for t in rows:
        yield (
            f"| {t.family} | {t.gpu} | {t.n} | {t.unsupported} | {percent(t.mape)} | "
            f"{percent(t.bias)} | {t.faster_cold} | {t.faster_warm} |"
        )


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
        yield f"| {family} | {reason.replace('|', '/')} | {n} |"


def reason_counts(comparison: Comparison) -> list[tuple[str, str, int]]:
    """Rows without a prediction by family and reason, most frequent first within a family."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for u in comparison.unsupported:
        counts[u.family, u.reason] += u.n
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    return [(family, reason, n) for (family, reason), n in ordered]

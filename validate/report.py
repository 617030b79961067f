"""A comparison as Markdown: the accuracy record that stands in the documentation."""

from __future__ import annotations

import datetime
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from validate.compare import Comparison, Table

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
    comparison: Comparison, *, on: datetime.date, data: str, command: str = ""
) -> str:
    """The whole document: what was compared, errors by family and GPU, rows without a count."""
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
    if command:
        lines += ["", f"Written by `{command}`."]
    return "\n".join(lines) + "\n"


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

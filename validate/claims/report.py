"""Published claims as Markdown: what was reproduced, what is off, what is left out."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterator, Sequence

from validate.claims.claim import Value
from validate.claims.evaluate import NOT_MODELLED, OFF, Verdict
from validate.claims.score import Balanced, Score, balanced, score, scores


def claims_markdown(verdicts: Sequence[Verdict], *, on: datetime.date, command: str) -> str:
    """The whole document: scores, then every claim that is off, then the reasons for the rest."""
    return "\n".join([*_head(verdicts, on, command), *_scores(verdicts), *_misses(verdicts),
                      *_reasons(verdicts), ""])  # fmt: skip


def _head(verdicts: Sequence[Verdict], on: datetime.date, command: str) -> Iterator[str]:
    yield "# Published claims"
    yield ""
    yield (
        f"{on}: {len(verdicts)} published claims of {len({v.claim.id for v in verdicts})} systems "
        f"against what the model says (`{command}`)."
    )
    yield ""
    yield (
        "A claim is *reproduced* within 15 % (memory, complexity and ratios that follow from "
        "shapes: within 2 %), else *off*, with predicted / published beside it. *Scored* leaves "
        "out claims of low confidence and those whose setting does not fix device and shape. "
        "*Shapes*: share within 2 %. *Error*: median error of times, speedups and throughputs; "
        "*in 1.5*: share of them within a factor of 1.5."
    )
    yield ""


def _scores(verdicts: Sequence[Verdict]) -> Iterator[str]:
    heads = ("system", "claims", "scored", "evaluated", "reproduced", "off", "shapes %",
             "error %", "in 1.5 %")  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield f"|---|{'--:|' * (len(heads) - 1)}"
    found = scores(verdicts)
    for one in found:
        yield _row(one)
    yield _row(score("all claims", "", verdicts))
    yield _balanced_row(balanced(found))
    yield ""


def _row(s: Score) -> str:
    return (
        f"| {s.id} | {s.num_claims} | {s.num_complete} | {s.num_evaluated} | {s.reproduced} | "
        f"{s.off} | {_hundredths(s.exact_within_frac)} | {_hundredths(s.timed_median_error)} | "
        f"{_hundredths(s.timed_within_factor_frac)} |"
    )


def _balanced_row(b: Balanced) -> str:
    return (
        f"| a vote a system ({b.num_systems}) | | | {_hundredths(b.evaluated_frac)} % | | | "
        f"{_hundredths(b.exact_within_frac)} | {_hundredths(b.timed_median_error)} | "
        f"{_hundredths(b.timed_within_factor_frac)} |"
    )


def _misses(verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield "## Off"
    yield ""
    yield "| system | claim | setting | published | predicted | ratio |"
    yield "|---|---|---|--:|--:|--:|"
    for v in verdicts:
        if v.status == OFF:
            ratio = "-" if v.ratio is None else f"{v.ratio:.2f}"
            yield (
                f"| {v.claim.id} | {_cell(v.claim.quantity)} | {_cell(setting_text(v))} | "
                f"{_cell(value_text(v.claim.published))} {_cell(v.claim.unit)} | "
                f"{_cell(value_text(v.predicted))} | {ratio} |"
            )
    yield ""


def _reasons(verdicts: Sequence[Verdict]) -> Iterator[str]:
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for v in verdicts:
        if v.status == NOT_MODELLED:
            reasons[v.claim.id, v.reason] += 1
    yield "## Not modelled"
    yield ""
    yield "| system | why | claims |"
    yield "|---|---|--:|"
    for (name, reason), n in reasons.items():
        yield f"| {name} | {_cell(reason)} | {n} |"


def setting_text(verdict: Verdict) -> str:
    """The setting in a line."""
    return ", ".join(f"{k} {v}" for k, v in verdict.claim.setting.items())


def value_text(value: Value) -> str:
    """A figure to four digits, a pair as a range.

    >>> value_text(0.123456), value_text((1.0, 3.0)), value_text("OOM")
    ('0.1235', '1 .. 3', 'OOM')
    """
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " .. ".join(value_text(v) for v in value)
    return value if isinstance(value, str) else f"{value:.4g}"


def _hundredths(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

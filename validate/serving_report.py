"""A comparison of serving figures as a section of the accuracy record."""

from __future__ import annotations

from collections.abc import Iterator

from simulator.serving import PROMPT_TOKENS
from validate.report import percent
from validate.serving import ALL, BARS, ServingComparison, ServingTable
from validate.serving_rows import TPOT, TTFT


def serving_markdown(found: ServingComparison) -> str:
    """Time per output token and to the first, by group; what was promised; the other rows."""
    return "\n".join(_lines(found))


def kept(table: ServingTable) -> bool | None:
    """Is the family's bar kept? None where nothing was promised for this table."""
    whole = (table.gpu, table.engine, table.mode, table.model) == (ALL, ALL, ALL, ALL)
    if table.metric != TPOT or not whole or table.family not in BARS:
        return None
    return table.mape <= BARS[table.family]


def _lines(found: ServingComparison) -> Iterator[str]:
    yield "## Serving"
    yield ""
    yield (
        f"`{TPOT}`: time per output token, kernels and the host's fitted constants. `{TTFT}`: time "
        f"to the first token, of runs whose prompts in flight are no more than {PROMPT_TOKENS} "
        "tokens together, so that one pass takes them all. A model that may draft tokens without "
        "its rows saying so is a family of its own."
    )
    yield ""
    for table in found.totals:
        within = kept(table)
        if within is not None:
            yield (
                f"- {table.family}: MAPE {percent(table.mape)} % over {table.n} figures, bar "
                f"{percent(BARS[table.family])} %: {'kept' if within else 'missed'}."
            )
    yield ""
    yield (
        "| metric | family | GPU | engine | mode | model | n | MAPE % | median % | p90 % | bias % |"
    )
    yield "|---|---|---|---|---|---|--:|--:|--:|--:|--:|"
    for t in (*found.totals, *found.tables):
        errors = " | ".join(percent(v) for v in (t.mape, t.median, t.p90, t.bias))
        names = " | ".join((t.metric, t.family, t.gpu, t.engine, t.mode, t.model))
        yield f"| {names} | {t.n} | {errors} |"
    yield ""
    yield "| metric | without a prediction: reason | rows |"
    yield "|---|---|--:|"
    for metric, reason, n in found.reasons:
        yield f"| {metric} | {reason} | {n} |"

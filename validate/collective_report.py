"""The section of the accuracy record on collectives by kind of group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from validate.collective_cells import LEAST_BYTES, LIMIT_FRAC, CollectiveCell
from validate.report import percent

VERDICTS: Final = {None: "", True: "kept", False: "missed"}


def collectives_markdown(cells: Sequence[CollectiveCell]) -> str:
    """Errors by GPU and kind of group, the verdict in the row that adds a GPU's groups up."""
    judged = [c for c in cells if c.kept is not None]
    lines = [
        "## Collectives by kind of group",
        "",
        f"Payloads of {LEAST_BYTES // 1024} KB and more, over rows that no calibration was fitted "
        f"on; the bar is {percent(LIMIT_FRAC)} % MAPE per GPU over all kinds of group: "
        f"{sum(bool(c.kept) for c in judged)} of {len(judged)} GPUs keep it. *Without*: rows that "
        "no op counts or that a calibration has seen.",
        "",
        "| GPU | group | n | without | MAPE % | median % | bias % | in 80 % | constants | bar |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for c in cells:
        errors = " | ".join(map(percent, (c.mape, c.median_ape, c.bias, c.coverage_80)))
        name = " ".join(c.gpu.split()).replace("|", "/")
        lines.append(
            f"| {name} | {c.kind} | {c.n} | {c.without} | {errors} | {c.scope or '-'} | "
            f"{VERDICTS[c.kept]} |"
        )
    return "\n".join(lines) + "\n"

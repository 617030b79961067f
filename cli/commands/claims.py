"""`ridgeplan claims`: published claims against what the model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.files import check_writable, write_all
from cli.options import AsJson
from cli.progress import patience
from cli.quantity import shown
from hwmodels.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from validate.claims.evaluate import Verdict
    from validate.claims.score import Balanced, Score


def claims(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A JSON file of published claims.")],
    system: Annotated[
        list[str] | None,
        typer.Option("--system", "-s", metavar="ID", help="Only this system; may repeat."),
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option("--family", metavar="F", help="Only this family of systems; may repeat."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the claims record.")
    ] = None,
    scores_file: Annotated[
        Path | None,
        typer.Option("--scores", metavar="FILE", help="Write the counts that `systems` shows."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate published claims: reproduced, off by a ratio, or not modelled.

    Each claim is evaluated from its setting (device, shape, implementation) alone.
    FILE holds a list of systems: [{"id", "family", "claims": [{"quantity", "value" or "low" and
    "high", "unit", "setting", "kind", "confidence"}]}]. Reproduced is within 15 %, for what
    follows from shapes (kinds memory, complexity, ratio) within 2 %.

    \b
    Examples:
      ridgeplan claims claims.json
      ridgeplan claims claims.json -s flash_attention_2
      ridgeplan claims claims.json --family attention --json
    """
    check_writable([f for f in (markdown, scores_file) if f is not None])
    with patience(f"evaluating {shown(file)}"):
        from validate.claims.claim import read_claims
        from validate.claims.evaluate import evaluate_all

        found = _chosen(read_claims(file), system or [], family or [])
        verdicts = evaluate_all(found)
    contents: dict[Path, bytes] = {}
    if markdown is not None:
        contents[markdown] = _markdown(verdicts, file, system or [], family or []).encode()
    if scores_file is not None:
        contents[scores_file] = _scores(verdicts)
    write_all(contents)
    if as_json:
        show.print_json(_document(verdicts))
        return
    if system:
        _show_claims(verdicts)
    _show_scores(verdicts)
    show.wrote(contents)


def _chosen(found: list[Any], systems: Sequence[str], families: Sequence[str]) -> list[Any]:
    """The claims that were asked for; a name that no claim has is an error."""
    for asked, what, known in (
        (systems, "system", [c.id for c in found]),
        (families, "family", [c.family for c in found]),
    ):
        for name in asked:
            if name not in known:
                raise UnknownNameError(what, name, list(dict.fromkeys(known)))
    chosen = [
        c
        for c in found
        if (not systems or c.id in systems) and (not families or c.family in families)
    ]
    if not chosen:
        raise InputError("no claims in the file, or none of that system and family")
    return chosen


def _markdown(
    verdicts: Sequence[Verdict], file: Path, systems: Sequence[str], families: Sequence[str]
) -> str:
    import datetime

    from validate.claims.report import claims_markdown

    chosen = [*(f"-s {s}" for s in systems), *(f"--family {f}" for f in families)]
    command = " ".join(["ridgeplan claims", file.name, *chosen])
    return claims_markdown(verdicts, on=datetime.date.today(), command=command)


def _scores(verdicts: Sequence[Verdict]) -> bytes:
    import json

    from validate.claims.score import record

    return (json.dumps(record(verdicts), indent=1) + "\n").encode()


def _document(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    from validate.claims.score import balanced, score, scores

    by_system = scores(verdicts)
    summary = dataclasses.asdict(score("all", "", verdicts))
    del summary["id"], summary["family"]
    return {
        "summary": summary
        | {
            "by_system": [dataclasses.asdict(s) for s in by_system],
            "every_system_alike": dataclasses.asdict(balanced(by_system)),
        },
        "claims": [_record(v) for v in verdicts],
    }


def _record(v: Verdict) -> dict[str, Any]:
    c = v.claim
    return {
        "id": c.id,
        "quantity": c.quantity,
        "unit": c.unit,
        "kind": c.kind,
        "confidence": c.confidence,
        "setting": dict(c.setting),
        "published": c.published,
        "predicted": v.predicted,
        "ratio": v.ratio,
        "status": v.status,
        "reason": v.reason,
    }


def _show_claims(verdicts: Sequence[Verdict]) -> None:
    from validate.claims.report import setting_text, value_text

    numbers = ("published", "predicted", "ratio")
    table = show.table("claim", "setting", *numbers, "status", right=numbers)
    for v in verdicts:
        ratio = "" if v.ratio is None else f"{v.ratio:.2f}"
        told = v.status if not v.reason else f"{v.status}: {shown(v.reason, 60)}"
        published = f"{value_text(v.claim.published)} {v.claim.unit}".strip()
        table.add_row(
            shown(v.claim.quantity, 50), shown(setting_text(v), 90), shown(published, 40),
            shown(value_text(v.predicted), 40), ratio, told,
        )  # fmt: skip
    show.console().print(table)


def _show_scores(verdicts: Sequence[Verdict]) -> None:
    from validate.claims.score import balanced, score, scores

    numbers = (
        "claims",
        "scored",
        "evaluated",
        "reproduced",
        "off",
        "shapes %",
        "error %",
        "in 1.5",
    )
    table = show.table("system", *numbers, right=numbers)
    table.padding = (0, 1, 0, 0)
    found = scores(verdicts)
    for s in found:
        table.add_row(*_cells(s))
    table.add_section()
    table.add_row(*_cells(score("all claims", "", verdicts)))
    table.add_row(*_balanced(balanced(found)))
    out = show.console()
    out.print(table)
    out.print(
        "scored: confidence medium or high, and a setting that fixes device and shape. 'shapes': "
        "share within 2 % of what follows from shapes; 'error': median error of times, speedups "
        "and throughputs; 'in 1.5': share of them within a factor of 1.5."
    )


def _cells(s: Score) -> tuple[str, ...]:
    counts = (s.num_claims, s.num_complete, s.num_evaluated, s.reproduced, s.off)
    return (
        s.id, *map(str, counts), _hundredths(s.exact_within_frac),
        _hundredths(s.timed_median_error), _hundredths(s.timed_within_factor_frac),
    )  # fmt: skip


def _balanced(b: Balanced) -> tuple[str, ...]:
    return (
        f"a vote a system ({b.num_systems})", "", "", _hundredths(b.evaluated_frac), "", "",
        _hundredths(b.exact_within_frac), _hundredths(b.timed_median_error),
        _hundredths(b.timed_within_factor_frac),
    )  # fmt: skip


def _hundredths(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.1f}"

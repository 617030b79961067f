"""`ridgeplan systems`: every published system and whether it is modelled."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cli import show
from cli.options import AsJson


def systems(as_json: AsJson = False) -> None:
    """The published systems with their status, and the plain ops.

    proved: a program that counts itself backs the closed form. derived: the closed form stands
    alone. not yet: no op models the system.
    """
    from validate.claims.score import shipped_record
    from workloads import registry

    scores = shipped_record()
    found = [
        {
            "id": system.id,
            "title": system.title,
            "family": system.family,
            "paper": system.paper,
            "status": registry.system_status(system),
            "op": system.op or None,
            "claims": dict(scores[system.id]) if system.id in scores else None,
        }
        for system in registry.systems()
    ]
    backing = {system.op for system in registry.systems()}
    ops = [
        {"id": name, "summary": registry.summary(name), "status": registry.status(name)}
        for name in registry.names()
        if name not in backing
    ]
    if as_json:
        show.print_json({"systems": found, "ops": ops})
    else:
        _show(found, ops)


def _claims_text(counts: dict[str, int] | None) -> str:
    """'12 / 14 of 15', or nothing where none was ever evaluated."""
    if not counts or not counts["evaluated"]:
        return "" if not counts else f"0 / 0 of {counts['claims']}"
    evaluated = counts["reproduced"] + counts["off"]
    return f"{counts['reproduced']} / {evaluated} of {counts['claims']}"


def _show(found: list[dict[str, Any]], ops: list[dict[str, Any]]) -> None:
    table = show.table("system", "title", "family", "status", "claims", right=("claims",))
    for row in found:
        shown = _claims_text(row["claims"])
        table.add_row(row["id"], row["title"], row["family"], row["status"], shown)
    plain = show.table("op", "what it is", "status", title="Plain ops")
    for row in ops:
        plain.add_row(row["id"], row["summary"], row["status"])
    counts = Counter(row["status"] for row in found)
    out = show.console()
    out.print(table)
    out.print(plain)
    shown = ", ".join(f"{counts[status]} {status}" for status in ("proved", "derived", "not yet"))
    out.print(
        "claims: reproduced / evaluated of all that are published (docs/claims.md); "
        "`ridgeplan claims FILE` evaluates them anew."
    )
    out.print(f"{len(found)} systems: {shown}; {len(ops)} plain ops.")

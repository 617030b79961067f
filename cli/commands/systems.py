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
    from workloads import registry

    found = [
        {
            "id": system.id,
            "title": system.title,
            "family": system.family,
            "paper": system.paper,
            "status": registry.system_status(system),
            "op": system.op or None,
            "claims": 0,  # published claims evaluated against this model so far
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


def _show(found: list[dict[str, Any]], ops: list[dict[str, Any]]) -> None:
    table = show.table("system", "title", "family", "status", "op")
    for row in found:
        table.add_row(row["id"], row["title"], row["family"], row["status"], row["op"] or "")
    plain = show.table("op", "what it is", "status", title="Plain ops")
    for row in ops:
        plain.add_row(row["id"], row["summary"], row["status"])
    counts = Counter(row["status"] for row in found)
    out = show.console()
    out.print(table)
    out.print(plain)
    shown = ", ".join(f"{counts[status]} {status}" for status in ("proved", "derived", "not yet"))
    out.print(f"{len(found)} systems: {shown}; {len(ops)} plain ops.")

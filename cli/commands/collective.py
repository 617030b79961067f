"""`ridgeplan collective`: one collective on a cluster, and what decides its time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.options import AsJson
from cli.quantity import digits, parse, parse_count, percent_text, scaled_text, seconds_text, shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from simulator.collective_answer import CollectiveAnswer


def collective(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="all_reduce, all_gather, all_to_all, ...")
    ],
    cluster: Annotated[
        str, typer.Option("--cluster", "-c", metavar="NAME", help="A cluster, or a TOML file.")
    ],
    size: Annotated[
        str,
        typer.Option(
            "--bytes",
            "-b",
            metavar="SIZE",
            help="nccl-tests' size: all a rank ends up with (all_gather) or starts from.",
        ),
    ],
    nodes: Annotated[
        int | None, typer.Option("--nodes", "-n", metavar="N", help="Nodes of it (default 1).")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", metavar="N", help="Ranks of a group (default: all).")
    ] = None,
    stride: Annotated[
        int, typer.Option("--stride", metavar="N", help="Places between neighbouring ranks.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """How long a collective takes on a cluster: its level, algorithm and protocol.

    All groups of so many ranks communicate at the same time, so that each rank has its own share of
    links and ports: a group of whole nodes has all ports of its nodes, one with a rank a node
    (--stride 8) one of them.

    \b
    Examples:
      ridgeplan collective all_reduce -c hgx-h100 -n 4 --bytes 1GiB
      ridgeplan collective all_gather -c dgx-a100-80gb -n 16 -b 256MiB --ranks 16 --stride 8
    """  # fmt: skip
    from hwmodels import catalog
    from simulator.collective_answer import answer
    from workloads.ops.collective import Collective

    num_bytes = _size(size)
    on = catalog.cluster(cluster, nodes)
    n = on.num_accelerators if ranks is None else ranks
    for what, value, least in (("--ranks", n, 2), ("--stride", stride, 1)):
        if value < least:
            raise InputError(f"{what} {value}: give {least} or more")
    found = answer(Collective(kind, num_bytes, n), on=on, stride=stride)
    document = _document(found, on.id, on.num_nodes)
    if as_json:
        show.print_json(document)
        return
    _show(found, document)


def _size(text: str) -> float:
    """Bytes; a plain number with a binary prefix as elsewhere."""
    try:
        value = float(parse_count(text, "--bytes"))
    except InputError:
        value = parse(text, "bytes", "--bytes")
    if value < 1 or value != math.floor(value):
        raise InputError(f"--bytes {shown(text)} is no whole number of bytes; give 64k or 1GiB")
    return int(value)


def _document(found: CollectiveAnswer, cluster: str, num_nodes: int) -> dict[str, Any]:
    c, p = found.collective, found.prediction
    low, high = (None, None) if p is None else (float(s) for s in p.interval(80))
    return {
        "kind": c.kind,
        "cluster": cluster,
        "num_nodes": num_nodes,
        "num_bytes": c.num_bytes,
        "num_ranks": c.num_ranks,
        "stride": found.stride,
        "level": found.level,
        "group_nodes": found.num_nodes,
        "algorithm": found.way[0] or None,
        "protocol": found.way[1] or None,
        "seconds": found.seconds,
        "low_s": low,
        "high_s": high,
        "bus_bytes_per_s": found.bus_bytes_per_s,
        "bound_s": float(found.bound.lower_s),
        "bound_s_by_level": {k: float(v) for k, v in found.bound.seconds_by_level.items()},
        "ways": [{"algorithm": a, "protocol": p, "seconds": s}
                 for (a, p), s in sorted(found.seconds_by_way.items(), key=lambda way: way[1])],
        "rung": "bound" if p is None else p.rung,
        "notes": [found.reason] if p is None else list(p.notes),
    }  # fmt: skip


def _show(found: CollectiveAnswer, r: dict[str, Any]) -> None:
    out = show.console()
    out.print(f"{r['kind']} of {scaled_text(r['num_bytes'], 'B')} on {r['cluster']}", style="bold")
    where = "inside a node" if r["group_nodes"] == 1 else f"over {r['group_nodes']} nodes"
    apart = "" if r["stride"] == 1 else f", {r['stride']} apart"
    lines = [
        ("Group", f"{r['num_ranks']} ranks{apart}, {where}"),
        ("Level", r["level"]),
    ]
    if r["algorithm"]:
        lines.append(("Algorithm", f"{r['algorithm']}, protocol {r['protocol']}"))
    time = seconds_text(r["seconds"])
    if r["low_s"] is not None:
        span = f"{seconds_text(r['low_s'])} .. {seconds_text(r['high_s'])}"
        time += f" ({span} holds four of five measurements)"
    lines += [
        ("Time", time),
        ("Bus", f"{scaled_text(r['bus_bytes_per_s'], 'B/s')} (nccl-tests' bus bandwidth)"),
        ("Bound", _bound_text(r)),
        ("Rung", f"{r['rung']}; {'; '.join(r['notes'])}"),
    ]
    out.print(show.pairs(lines))
    if len(r["ways"]) > 1:
        made = show.table("algorithm", "protocol", "time", "x the fastest", right=("time",))
        for way in r["ways"]:
            made.add_row(way["algorithm"], way["protocol"], seconds_text(way["seconds"]),
                         digits(way["seconds"] / r["ways"][0]["seconds"]))  # fmt: skip
        out.print(made)


def _bound_text(r: dict[str, Any]) -> str:
    """The bound and the share of it by level."""
    levels = ", ".join(
        f"{name} {seconds_text(s)}" for name, s in r["bound_s_by_level"].items() if s > 0
    )
    reached = percent_text(r["bound_s"] / r["seconds"]) if r["seconds"] else "-"
    return f"{seconds_text(r['bound_s'])} at wire rate ({levels or 'nothing moves'}): {reached}"

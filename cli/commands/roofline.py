"""`ridgeplan roofline`: ops under the roofs of their devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cli import show
from cli.options import AsJson, Family, Html, MaybeOver, Out, Params, SomeNames
from cli.quantity import digits, scaled_text, seconds_text
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from cli.questions import Over
    from cli.roofs import Place, Roofs

MAX_DEVICES: Final = 4
MAX_POINTS: Final = 400
"""Values of a sweep that a path can show; more would hide one another."""


def roofline(
    device: Annotated[
        list[str],
        typer.Option("--device", "-d", metavar="NAME", help="A device; may repeat, a panel each."),
    ],
    names: SomeNames = None,
    family: Family = None,
    param: Params = None,
    over: MaybeOver = None,
    html: Html = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Ops under the roofs of devices: table or chart.

    \b
    Examples:
      ridgeplan roofline matmul -d h100-sxm -d mi300x -p m=4k -p n=4k -p k=4k
      ridgeplan roofline matmul -d h100-sxm --over m=16:8k:x2 -p n=8k -p k=8k --out r.html
    """
    from cli.charts.picture import asked_for, rendered
    from cli.files import check_writable, write_all
    from cli.progress import patience
    from cli.questions import family_members, left_out_text, parse_over
    from cli.roofs import by_device, place_of, roofs_of
    from cli.series import ask_all
    from simulator.estimate import BOUND
    from workloads import registry

    pictures = asked_for(html, out)
    check_writable(pictures)
    own = [registry.resolve(name) for name in names or []]
    swept = parse_over(over, own) if over else None
    if swept is not None and len(swept.values) > MAX_POINTS:
        raise InputError(f"--over has more than {MAX_POINTS} points; take a larger step")
    members, left_out = family_members(family, param or [], swept)
    if not (own or members):
        raise InputError("name ops, or a family of systems with --family")
    chosen = list(dict.fromkeys([*own, *members]))
    series = by_device(ask_all(chosen, device, param or [], swept, BOUND))
    if len(series) > MAX_DEVICES:
        raise InputError(f"{len(series)} devices in one picture; give at most {MAX_DEVICES}")
    panels = [
        (roofs_of(found[0].estimate.device, found), [place_of(s) for s in found])
        for found in series.values()
    ]
    contents: dict[Path, bytes] = {}
    if pictures:
        from cli.charts import roofline as chart

        with patience("drawing"):
            figure = chart.figure(panels, swept)
            contents = {path: rendered(figure, path.suffix) for path in pictures}
    write_all(contents)
    if as_json:
        _print_json(panels, swept, left_out)
    else:
        _show(panels, swept)
        if left_out:
            show.console().print(left_out_text(left_out, family))
        show.wrote(contents)


def _print_json(
    panels: Sequence[tuple[Roofs, Sequence[Place]]], over: Over | None, left_out: Sequence[str]
) -> None:
    show.print_json(
        {
            "over": None if over is None else {"param": over.key, "values": over.values},
            "devices": [roofs.document() for roofs, _ in panels],
            "left_out": list(left_out),
            "places": [place.document() for _, places in panels for place in places],
        }
    )


def _show(panels: Sequence[tuple[Roofs, Sequence[Place]]], over: Over | None) -> None:
    out = show.console()
    for roofs, places in panels:
        out.print(f"{roofs.device.id} ({roofs.device.name})", style="bold")
        out.print(_roof_table(roofs))
        out.print(_place_table(places, over))
    out.print("Rung bound: peaks and lower bounds; real kernels are slower.")


def _roof_table(roofs: Roofs) -> object:
    heads = [f"{c.name} {scaled_text(c.flops_per_s, 'FLOP/s')}" for c in roofs.compute]
    table = show.table("level", "bandwidth", *heads, right=("bandwidth", *heads))
    ridges = {(r.level, r.roof): r.flops_per_byte for r in roofs.ridges}
    for memory in roofs.memory:
        cells = [f"ridge {digits(ridges[memory.level, c.name])}" for c in roofs.compute]
        table.add_row(memory.level, scaled_text(memory.bytes_per_s, "B/s"), *cells)
    return table


def _place_table(places: Sequence[Place], over: Over | None) -> object:
    levels = list(dict.fromkeys(level for place in places for level in place.intensity))
    swept = [over.key] if over is not None else []
    numbers = (*swept, *(f"FLOP/{level} byte" for level in levels), "FLOP/s", "time")
    table = show.table("op", *numbers, "bound", right=numbers)
    for place in places:
        for i, value in enumerate(place.series.values):
            intensity = [
                digits(float(place.intensity[x][i])) if x in place.intensity else "-"
                for x in levels
            ]
            table.add_row(
                place.series.op_name,
                *([f"{value:,}"] if swept else []),
                *intensity,
                scaled_text(float(place.flops_per_s[i]), ""),
                seconds_text(float(place.series.seconds[i])),
                str(place.series.bound[i]),
            )
    return table

"""`ridgeplan kernels rank`: do expected and measured orders of tile configurations agree?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli import show
from cli.commands.records_show import RecordFiles
from cli.options import AsJson
from cli.progress import patience
from cli.quantity import digits, percent_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from validate.inspection.ranking import Order


def kernels_rank(
    path: RecordFiles,
    device: Annotated[
        str,
        typer.Option("--device", "-d", metavar="NAME", help="The device that was measured."),
    ],
    as_json: AsJson = False,
) -> None:
    """How well static analysis orders tiles that were timed.

    Spearman's rank correlation by kernel, over every record that tried at least 3 configurations,
    and how often the configuration expected to be fastest ran within 5 % of the fastest.

    \b
    Example:
      ridgeplan kernels rank h200/ -d h200-sxm
    """
    from hwmodels import catalog

    on = catalog.device(device)
    with patience("ranking configurations"):
        from validate.inspection.ranking import orders
        from validate.kernels import registry
        from validate.record import read_records
        from validate.record_files import path_of

        records = [r for p in path for r in read_records(path_of(p)).records]
        found = orders(records, on, {spec.name: spec for spec in registry.specs()})
    if as_json:
        show.print_json({"device": on.id, "kernels": [x.as_dict() for x in found]})
        return
    _show(found)


def _show(found: Sequence[Order]) -> None:
    right = ("cases", "median rho", "near the best", "left out")
    table = show.table("kernel", "by", *right, right=right)
    for x in found:
        facts = x.as_dict()
        rho, near = facts["median_rho"], facts["near_frac"]
        table.add_row(
            x.kernel, x.implementation, str(len(x.rho)), "-" if rho is None else digits(rho, 2),
            "-" if near is None else percent_text(near), str(sum(x.left_out.values())),
        )  # fmt: skip
    show.console().print(table)
    for x in found:
        for reason, number in x.left_out.items():
            print(f"left out: {x.kernel} ({x.implementation}): {number}: {reason}")
    if not found:
        print("no record tried several configurations")

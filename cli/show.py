"""What goes to stdout: rich tables for people, one JSON document for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAX_WIDTH: Final = 100
JSON_VERSION: Final = 1


def width() -> int:
    """Columns to print in: the terminal's or COLUMNS, never more than 100, 100 in a pipe."""
    given = os.environ.get("COLUMNS", "")
    if given.isdigit() and int(given) > 0:
        columns = int(given)
    elif sys.stdout.isatty():
        columns = os.get_terminal_size(sys.stdout.fileno()).columns or MAX_WIDTH
    else:
        columns = MAX_WIDTH
    return max(min(columns, MAX_WIDTH), 20)


def console() -> Console:
    """A console on stdout as it is now; names and figures are printed as they are."""
    from rich.console import Console

    return Console(file=sys.stdout, width=width(), highlight=False, markup=False, emoji=False)


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house look; the columns named in `right` are numbers."""
    from rich import box
    from rich.table import Table

    made = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False
    )
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def pairs(lines: Sequence[tuple[str, str]]) -> Table:
    """Facts under one another, each after its name; long ones wrap beside it."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in lines:
        grid.add_row(name, text)
    return grid


def wrote(paths: Iterable[object]) -> None:
    """One line a file that was written."""
    for path in paths:
        print(f"wrote {path}")


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document with its contract's version first; numbers at full precision."""
    body = {"version": JSON_VERSION, **document}
    print(json.dumps(plain(body), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """The value in JSON's types: dataclasses as objects, arrays as lists, infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return plain(value.tolist())  # a NumPy array or scalar, without importing NumPy here

"""What `plan memory` reads: tensors from a CSV file, a graph from a JSON file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cli.quantity import parse, shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from simulator.planners.rematerialise import Graph, Node
    from simulator.planners.storage import Tensors

COLUMNS: Final = ("size", "start", "end")
MOST_ROWS: Final = 200_000


def load_tensors(path: Path) -> Tensors:
    """A CSV file with columns size, start, end and, if there is one, name."""
    import numpy as np

    from simulator.planners.storage import Tensors

    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {shown(path, 200)}: {error}; give a CSV file") from None
    missing = [key for key in COLUMNS if not rows or key not in rows[0]]
    if missing:
        raise InputError(
            f"{shown(path.name, 80)} has no rows with '{missing[0]}'; its columns are name, size, "
            "start, end"
        )
    if len(rows) > MOST_ROWS:
        raise InputError(f"{shown(path.name, 80)} has more than {MOST_ROWS} rows; leave some out")
    numbers = np.array(
        [[_whole(row[key], key, i) for key in COLUMNS] for i, row in enumerate(rows)]
    )
    return Tensors(
        names=tuple(row.get("name") or f"tensor {i}" for i, row in enumerate(rows)),
        sizes=numbers[:, 0], starts=numbers[:, 1], ends=numbers[:, 2],
    )  # fmt: skip


def _whole(text: str | None, key: str, row: int) -> int:
    what = f"{key} of row {row + 1}"
    number = parse(text or "", "bytes", what) if key == "size" else _count(text or "", what)
    if not abs(number) <= 2**53 or number != int(number):
        raise InputError(f"{what} = '{shown(text)}' is not a whole number; mend the file")
    return int(number)


def _count(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{what} = '{shown(text)}' is not a number; mend the file") from None


def load_json(path: Path) -> Any:
    """The file's document."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {shown(path, 200)}: {shown(error, 80)}; give a model's "
                         "config.json, or a graph with nodes") from None  # fmt: skip


def graph_of(document: dict[str, Any], name: str) -> Graph:
    """Nodes with name, seconds, bytes and reads; `fixed_bytes` beside them."""
    from simulator.planners.rematerialise import Graph

    nodes = document["nodes"]
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise InputError(f"{name}: nodes must be a list of objects; see `plan memory --help`")
    return Graph(
        nodes=tuple(_node(node, i) for i, node in enumerate(nodes)),
        fixed_bytes=_number(document, "fixed_bytes", "the graph", 0.0),
    )


def _node(node: dict[str, Any], at: int) -> Node:
    from simulator.planners.rematerialise import Node

    name, reads = node.get("name"), node.get("reads", [])
    if not isinstance(name, str) or not isinstance(reads, list):
        raise InputError(f"node {at + 1} needs a name, and reads as a list of names")
    return Node(
        name=name, seconds=_number(node, "seconds", f"node '{shown(name)}'"),
        num_bytes=_number(node, "bytes", f"node '{shown(name)}'"), reads=tuple(map(str, reads)),
    )  # fmt: skip


def _number(node: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = node.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e300:
        raise InputError(f"{where}: {key} must be a number from 0 up")
    return float(value)

"""Measured rows as array-valued ops: rows that differ in size only become one op."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError
from simulator.kernel_time.model import Conditions
from validate.adapters import Part, Uncounted, parts
from validate.measurement import Measurement
from workloads.op import Op


@dataclass(frozen=True, slots=True)
class Batch:
    """One op whose sizes are arrays over rows; a row of several parts is in several batches."""

    device_id: str
    op: Op
    conditions: Conditions
    where: NDArray[np.intp]
    flag: str = ""


def batches(rows: Sequence[Measurement]) -> tuple[tuple[Batch, ...], tuple[str | None, ...]]:
    """All rows as batches, and by row the reason why it is in none (None where it is)."""
    reasons: list[str | None] = [None] * len(rows)
    alike: dict[Any, list[tuple[int, Part]]] = defaultdict(list)
    for i, row in enumerate(rows):
        try:
            for part in parts(row):
                key = (
                    row.device_id,
                    part.op,
                    part.fixed,
                    part.conditions,
                    part.flag,
                    tuple(part.sizes),
                )
                alike[key].append((i, part))
        except Uncounted as why:
            reasons[i] = str(why)
    found: list[Batch] = []
    for (device_id, *_), members in alike.items():
        found += _built(device_id, members, reasons)
    return tuple(found), tuple(reasons)


def _built(
    device_id: str, members: Sequence[tuple[int, Part]], reasons: list[str | None]
) -> Iterator[Batch]:
    """One batch, or the halves of one where the op refuses some sizes."""
    part = members[0][1]
    try:
        sizes = {name: np.array([float(p.sizes[name]) for _, p in members]) for name in part.sizes}
        op = part.op(**dict(part.fixed), **sizes)
    except InputError as why:
        if len(members) == 1:
            reasons[members[0][0]] = f"{part.op.name} refuses the sizes: {why}"
            return
        half = len(members) // 2
        yield from _built(device_id, members[:half], reasons)
        yield from _built(device_id, members[half:], reasons)
    else:
        where = np.array([i for i, _ in members], dtype=np.intp)
        yield Batch(device_id, op, part.conditions, where, part.flag)

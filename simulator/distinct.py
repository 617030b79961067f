"""Price the few plans that differ, and hand the answers to the many that are alike.

Thousands of plans share a few dozen kernel shapes and a few hundred groups of ranks. `distinct`
finds one plan for every combination of some fields and says where each plan finds its own; `taken`
hands out what was priced for those alone. Fields hold small whole numbers: combinations are found
with tables of marks, in time linear in the plans, not by sorting them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from workloads.numeric import Num
from workloads.plan import Plan

T = TypeVar("T")
Index = NDArray[np.int64]

MOST_MARKS: Final = 2**22
"""Entries of a table of marks; with more combinations than that, plans are sorted."""


def distinct(
    plan: Plan, names: Sequence[str], *, by: Sequence[Num] = (), carried: Sequence[str] = ()
) -> tuple[Plan, Index | None]:
    """Plans that differ in the fields named, which alone they have, and where each finds its own.

    `by` are whole numbers that tell plans apart too; fields `carried` are those of the first of
    the plans that are alike. The second is None for a single plan.

    >>> alike, index = distinct(Plan(tp=np.array([1, 8, 1]), dp=np.array([2, 4, 8])), ["tp"])
    >>> alike.tp.tolist(), index.tolist()
    ([1.0, 8.0], [0, 1, 0])
    """
    values = [getattr(plan, name) for name in names]
    beside = [getattr(plan, name) for name in carried]
    if not any(isinstance(v, np.ndarray) for v in (*values, *by, *beside)):
        return plan, None
    columns = np.broadcast_arrays(*values, *beside, *by)
    shape, told = columns[0].shape, (*names, *carried)
    code: Index = np.zeros(columns[0].size, dtype=np.int64)
    for column in (*columns[: len(values)], *columns[len(told) :]):
        if column.strides and any(column.strides):
            ranks, count = _ranked(np.asarray(column, dtype=np.int64).reshape(-1))
            code = code * count + ranks
    index, count = _ranked(code)
    first = np.zeros(count, dtype=np.int64)
    first[index[::-1]] = np.arange(index.size - 1, -1, -1)
    picked = {
        name: np.asarray(column).reshape(-1)[first].astype(np.float64)
        for name, column in zip(told, columns, strict=False)
    }
    return Plan(**picked), index.reshape(shape)


def _ranked(values: Index) -> tuple[Index, int]:
    """Each value's place among the different ones in order, and their number."""
    low = int(values.min(initial=0))
    span = int(values.max(initial=0)) - low + 1
    if span > MOST_MARKS:
        found, index = np.unique(values, return_inverse=True)
        return index, found.size
    marks = np.zeros(span, dtype=np.int64)
    marks[values - low] = 1
    places = np.cumsum(marks) - 1
    return places[values - low], int(places[-1]) + 1


def taken(value: T, index: Index) -> T:
    """The same dataclasses, mappings and tuples, with the entries `index` of every array."""
    return _taken(value, index)  # type: ignore[no-any-return]


def _taken(value: Any, index: Index) -> Any:
    if isinstance(value, np.ndarray):
        return value[index]
    if isinstance(value, Mapping):
        return {key: _taken(v, index) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_taken(v, index) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _taken(getattr(value, f.name), index) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value

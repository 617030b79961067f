"""The best value of a size that the implementer chooses: how long a chunk is.

An op names such sizes in `Op.tunable`, each with the values worth trying. The result is the same
with every value; the time is not: long chunks do more products among their own tokens, short ones
wait oftener for the state that the chunk before them leaves and write more states to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError, UnknownNameError
from workloads.numeric import Num, is_scalar
from workloads.op import Op

Seconds = Callable[[Op], Num]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """An op at the best value of one field; `best` is an array where the op has arrays.

    `seconds` of every value that is possible, `refused` why the others are not.
    """

    op: Op
    field: str
    best: Num
    seconds: Mapping[int, Num]
    refused: Mapping[int, str]


def tuned(op: Op, field: str, seconds: Seconds) -> Tuned:
    """`op` with `field` at the value of least `seconds`, for each of its shapes.

    Raises `UnknownNameError` where the op has no such choice, `InputError` where no value is
    possible.

    >>> from workloads.ops.linear_recurrence import LinearRecurrence
    >>> op = LinearRecurrence(num_heads=16, len_seq=8192, key_dim=64)
    >>> tuned(op, "chunk", lambda o: o.work(2**17).bytes).best
    16
    """
    if field not in op.tunable:
        raise UnknownNameError(f"choice of {op.name}", field, list(op.tunable))
    found: dict[int, Num] = {}
    refused: dict[int, str] = {}
    for value in op.tunable[field]:
        try:
            found[value] = seconds(op.over(**{field: value}))
        except InputError as why:
            refused[value] = str(why)
    if not found:
        raise InputError(next(iter(refused.values())))
    best = _least(found)
    return Tuned(op=op.over(**{field: best}), field=field, best=best, seconds=found,
                 refused=refused)  # fmt: skip


def _least(seconds: Mapping[int, Num]) -> Num:
    """The value of least time; of equals the smallest, for each shape."""
    values = sorted(seconds)
    if all(is_scalar(seconds[v]) for v in values):
        return min(values, key=lambda v: float(seconds[v]))
    stacked = np.stack(np.broadcast_arrays(*(seconds[v] for v in values)))
    best: NDArray[np.float64] = np.asarray(values, dtype=np.float64)[np.argmin(stacked, axis=0)]
    return best

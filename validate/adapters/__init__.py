"""A measured row as ops: what each published op name and dtype label means in our counts.

An adapter turns one row into the parts that run one after the other, or raises `Uncounted` with
the reason. What it leaves out of a row (a bias, a write to the KV cache) only lowers the count, so
the bound stays a bound; a row of which we would count too much is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

from validate.adapters import (
    attention_decode,
    attention_prefill,
    collective,
    conv2d,
    elementwise,
    gemm,
    mla_decode,
    mla_prefill,
    moe,
    recorded,
    rnn,
    scan,
    unknown,
)
from validate.adapters.part import Part, Uncounted
from validate.measurement import Measurement
from validate.recorded import is_ours, run_of

__all__ = ["ADAPTERS", "TRAINING_FAMILY", "Part", "Uncounted", "is_training_step", "parts"]

WHOLE_STEP = "a training step is held against the bound as a whole, not as one op"
TRAINING_FAMILY = "steps_training"

ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    **gemm.ADAPTERS,
    **attention_prefill.ADAPTERS,
    **mla_prefill.ADAPTERS,
    **attention_decode.ADAPTERS,
    **mla_decode.ADAPTERS,
    **elementwise.ADAPTERS,
    **moe.ADAPTERS,
    **collective.ADAPTERS,
    **rnn.ADAPTERS,
    **scan.ADAPTERS,
    **conv2d.ADAPTERS,
}


def parts(row: Measurement) -> tuple[Part, ...]:
    """The ops that run in a row, one after the other; raises `Uncounted`."""
    if is_training_step(row):
        raise Uncounted(WHOLE_STEP)
    if "parallelism" in row.params:
        raise Uncounted("a whole step is not one op")
    if row.seconds is None:
        raise Uncounted("the metric is not a time")
    adapter = ADAPTERS.get(row.op)
    try:
        if adapter is not None:
            found = adapter(row)
        elif recorded.is_kernel(row):
            found = recorded.parts_of(row)
        else:
            found = unknown.parts_of(row, ADAPTERS)
        if is_ours(row.source) and row.op not in collective.ADAPTERS:
            run = run_of(row.source)
            found = tuple(dataclasses.replace(part, conditions=run) for part in found)
        hash(tuple((p.fixed, p.conditions) for p in found))  # a list has no place there
    except KeyError as why:
        raise Uncounted(f"the params lack {why.args[0]!s:.30}, or it has no known value") from why
    except (ArithmeticError, IndexError, TypeError, ValueError) as why:
        # rows are other people's: one of an unforeseen form must not take the file along
        raise Uncounted("the params or the source have no known form") from why
    for name, size in ((n, s) for p in found for n, s in p.sizes.items()):
        if not isinstance(size, (int, float)):
            raise Uncounted(f"size {name} is not a number")
    return found


def is_training_step(row: Measurement) -> bool:
    """Does the row belong to a file of training steps?"""
    return row.family.startswith(TRAINING_FAMILY) and "parallelism" in row.params

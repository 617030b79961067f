"""Records whose case no public table names: the kernel of the suite says which op counts it.

The op of such a row is 'kernel:NAME' (and ':OP' where the case's own op has another name), its
params the case's. The suite needs torch and triton to be read; where they are missing, such rows
are refused with that reason and all others still count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from hwmodels.errors import InputError
from simulator.kernel_time.model import USUAL
from validate.adapters.part import Part, uncounted
from validate.kernels.ragged import Together
from validate.measurement import Measurement
from validate.record import Case
from validate.recorded import KERNEL, is_own_kernel
from workloads.op import Op

OTHER_ALGORITHMS: Final = frozenset({
    ("fft_convolution", "cufft"),
    ("shared_prefix_decode", "flash-attention"),
    ("shared_prefix_decode", "cudnn"),
    ("sparse_gemm", "cublas"),
})  # fmt: skip
"""Kernels of the suite and libraries whose baseline computes the result in another way than the
kernel's op counts: whole transforms, unshared prefixes, dense products."""

OF_SUITE: Final = "validate.kernels."


def is_kernel(row: Measurement) -> bool:
    """Does the row name a kernel of the suite, and no public op?"""
    return row.op.startswith(KERNEL)


def parts_of(row: Measurement) -> tuple[Part, ...]:
    """The ops that the row's kernel counts, one after the other; raises `Uncounted`."""
    name, _, op_name = row.op.removeprefix(KERNEL).partition(":")
    library = row.source.split("/")[1]
    if not is_own_kernel(row.source) and (name, library) in OTHER_ALGORITHMS:
        uncounted(f"{library} computes {name} in another way than its op counts")
    op = op_of(name, Case(op=op_name or name, dtype=row.dtype, params=dict(row.params)))
    return tuple(_part(one) for one in _kernels(op))


def op_of(kernel: str, case: Case) -> Op:
    """The op that counts a case of the suite; raises `Uncounted` with what is missing."""
    found, broken = _suite()
    if kernel not in found:
        why = f"; left out: {broken}" if broken else ""
        uncounted(f"the suite has no kernel {kernel:.40}{why}")
    try:
        counted: Op = found[kernel].op(case)
    except (InputError, KeyError, TypeError, ValueError, ArithmeticError) as why:
        uncounted(f"{kernel:.40} takes no such case: {' '.join(str(why).split()):.120}")
    return counted


@lru_cache(maxsize=1)
def _suite() -> tuple[Mapping[str, Any], str]:
    """The kernels by name, and in a few words which folders could not be read."""
    from validate.agenda import suites

    specs, broken = suites()
    missing = sorted({folder for folder, _ in broken})
    needs = any("ModuleNotFoundError" in reason for _, reason in broken)
    hint = " (pip install 'ridgeplan[gpu]')" if needs else ""
    return {spec.name: spec for spec in specs}, ", ".join(missing) + (hint if missing else "")


def _kernels(op: Op) -> Iterator[Op]:
    """The kernels of an op, each run once, in turn."""
    if isinstance(op, Together):
        uncounted("no model times one launch over problems of different sizes")
    stages = op.stages()
    if not stages:
        yield op
    for stage in stages:
        if stage.beside or stage.times != 1:
            uncounted(f"{op.name} runs {stage.name} several times, or beside others")
        yield from _kernels(stage.op)


def _part(op: Op) -> Part:
    """An op taken apart: its sizes may become arrays, all else stays.

    An op that the suite itself defines need not take arrays.
    """
    scalar = type(op).__module__.startswith(OF_SUITE)
    sizes: dict[str, Any] = {}
    fixed: list[tuple[str, Any]] = []
    for field in dataclasses.fields(op):
        value = getattr(op, field.name)
        if not scalar and "Num" in str(field.type) and isinstance(value, (int, float)):
            sizes[field.name] = value
        else:
            fixed.append((field.name, value))
    return Part(type(op), tuple(fixed), sizes, USUAL)

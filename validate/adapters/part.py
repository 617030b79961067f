"""What an adapter makes of a row: the ops that run in it, and how they were run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from hwmodels.dtypes import ALIASES, ALL, DType
from simulator.kernel_time.model import USUAL, Conditions
from validate.measurement import Measurement
from workloads.op import Op

PLAIN: Final[Mapping[str, DType]] = ALL | {alias: ALL[name] for alias, name in ALIASES.items()}
"""Every label that names one number format, with that format."""


class Uncounted(Exception):
    """No op of ours counts this row; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Part:
    """One op of a row: its class, the fields that may not become arrays, its sizes, its run.

    `flag` says what to doubt beyond the prediction's own interval; empty for a known op.
    """

    op: type[Op]
    fixed: tuple[tuple[str, Any], ...]
    sizes: Mapping[str, int]
    conditions: Conditions = USUAL
    flag: str = ""


def part(
    op: type[Op], sizes: Mapping[str, int], conditions: Conditions = USUAL, **fixed: object
) -> Part:
    """A part with its fixed fields given by name."""
    return Part(op, tuple(fixed.items()), sizes, conditions)


def uncounted(reason: str) -> NoReturn:
    """Give a row up, with the reason."""
    raise Uncounted(reason)


def plain_dtype(row: Measurement) -> DType:
    """The row's one number format; rows that mix formats are given up."""
    if row.dtype in PLAIN:
        return PLAIN[row.dtype]
    uncounted(f"{row.op} in {row.dtype} mixes formats and has no count yet")


def framework(row: Measurement) -> str:
    """The publisher's framework without its version: 'aic/vllm-0.24.0/x' is 'vllm'."""
    pieces = row.source.split("/")
    return pieces[1].split("-")[0] if len(pieces) > 1 else pieces[0]


def last_name(row: Measurement) -> str:
    """The last piece of the source: the kernel, where the publisher names one."""
    return row.source.rsplit("/", 1)[-1]


def host_of(row: Measurement) -> str:
    """Who paid the launch: empty for graph replays and profiler times, else the harness."""
    publisher = row.source.split("/", 1)[0]
    return publisher if publisher in EAGER else ""


EAGER: Final = frozenset({"neusight", "llmcompass", "deepbench", "flash-attention", "stas00"})
"""Publishers whose times hold the launch of an eager call, or may (figures, best-of searches)."""

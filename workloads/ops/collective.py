"""Collectives: bytes each rank sends over its link and serial steps, by algorithm, and proof.

Sizes follow nccl-tests: `num_bytes` is the total output of all_gather, the total input of
reduce_scatter, one rank's whole buffer otherwise. With n ranks, c = ceil(num_bytes / n) and
h = ceil(num_bytes / 2) (a ragged buffer is padded to equal parts, which is what the rank with the
largest part sends), for n > 1:

    kind            algorithm   bytes a rank sends   serial steps      source
    all_reduce      ring        2 (n - 1) c          2 (n - 1)         Patarasuk and Yuan 2009
    all_reduce      tree        min(n, 4) h          2 ceil(log2 n)    Sanders, Speck, Traeff 2009
    all_reduce      nvls        (n + 1) c            2                 NVLink SHARP, see below
    all_gather      ring        (n - 1) c            n - 1             Thakur et al. 2005
    reduce_scatter  ring        (n - 1) c            n - 1             Thakur et al. 2005
    all_to_all      ring        (n - 1) c            n - 1             Thakur et al. 2005
    broadcast       ring        num_bytes            n - 1             a chain
    broadcast       tree        2 h                  ceil(log2 n)      Sanders, Speck, Traeff 2009
    send_recv       ring        num_bytes            1                 each rank to the next

and nothing at all for n = 1. Every row is executed by `collective_rounds.simulate`, which passes
real chunks from rank to rank and counts; the tests hold both against each other.

all_to_all sends each part straight to its owner, at shift s in step s: links between any two
ranks (a switch) are assumed. The tree is two binary trees, each carrying half of the buffer,
arranged so that a rank with children in one is a leaf in the other; few ranks send four halves,
none more. nvls reduces in the switch: rank i asks for part i (the switch pulls that part from all
n ranks, i included) and multicasts the sum, so that a rank emits its buffer once and one part of
the result, and receives as much.

A step is a round of messages none of which waits for another. Libraries cut buffers into segments
so that the steps of chains and trees overlap: their time tends to steps * latency + bytes /
bandwidth, and what segments add to that is ignored, as are protocol overheads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from hwmodels.errors import UnknownNameError
from workloads.numeric import Num, ceil_div, floor, log2, minimum, where
from workloads.op import checked_number

Form: TypeAlias = Callable[[Num, Num], Num]


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective over `num_ranks` ranks; sizes may be arrays that broadcast.

    A fractional `num_ranks` (the average size of uneven groups) and zero bytes are welcome.

    >>> op = Collective("all_reduce", num_bytes=2**30, num_ranks=8)
    >>> op.wire_bytes() == 2 * 7 * 2**30 / 8, op.num_steps(), op.bus_factor()
    (True, 14, 1.75)
    """

    kind: str
    num_bytes: Num
    num_ranks: Num
    algorithm: str = "ring"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError("collective", self.kind, KINDS)
        if (self.kind, self.algorithm) not in _FORMS:
            known = [algorithm for kind, algorithm in _FORMS if kind == self.kind]
            raise UnknownNameError(
                f"{self.kind} algorithm", self.algorithm, known, f"it has {', '.join(known)}"
            )
        _set_number(self, "num_bytes", least=0)
        _set_number(self, "num_ranks", least=1)

    def wire_bytes(self) -> Num:
        """Bytes the busiest rank sends.

        >>> Collective("all_gather", 1000, 8).wire_bytes()
        875
        """
        form = _FORMS[self.kind, self.algorithm][0]
        return where(self.num_ranks > 1, form(self.num_ranks, self.num_bytes), 0)

    def num_steps(self) -> Num:
        """Rounds of messages, one after another, each of which costs a latency.

        >>> Collective("all_reduce", 1000, 9, "tree").num_steps()
        8
        """
        form = _FORMS[self.kind, self.algorithm][1]
        return where(self.num_ranks > 1, form(self.num_ranks, self.num_bytes), 0)

    def bus_factor(self) -> Num:
        """nccl-tests' bus bandwidth is num_bytes / seconds times this, whatever the algorithm.

        >>> Collective("reduce_scatter", 1000, 8).bus_factor()
        0.875
        """
        return _BUS_FACTOR[self.kind](self.num_ranks)


def _shared_sends(num_parts: Callable[[Num], Num]) -> Form:
    """Sends of 1 / n of the buffer each."""
    return lambda n, size: num_parts(n) * ceil_div(size, n)


def _half_sends(num_halves: Callable[[Num], Num]) -> Form:
    """Sends of one tree's half of the buffer each."""
    return lambda n, size: num_halves(n) * ceil_div(size, 2)


def _whole(n: Num, size: Num) -> Num:
    return size


def _steps(count: Callable[[Num], Num]) -> Form:
    return lambda n, size: count(n)


def _depth(n: Num) -> Num:
    """Levels below the root of a binary tree whose root has one child: ceil(log2 n)."""
    return -floor(-log2(n))


_OTHERS: Final = _steps(lambda n: n - 1)

_FORMS: Final[Mapping[tuple[str, str], tuple[Form, Form]]] = {
    ("all_reduce", "ring"): (_shared_sends(lambda n: 2 * (n - 1)), _steps(lambda n: 2 * (n - 1))),
    ("all_reduce", "tree"): (
        _half_sends(lambda n: minimum(n, 4)),
        _steps(lambda n: 2 * _depth(n)),
    ),
    ("all_reduce", "nvls"): (_shared_sends(lambda n: n + 1), _steps(lambda n: 2)),
    ("all_gather", "ring"): (_shared_sends(lambda n: n - 1), _OTHERS),
    ("reduce_scatter", "ring"): (_shared_sends(lambda n: n - 1), _OTHERS),
    ("all_to_all", "ring"): (_shared_sends(lambda n: n - 1), _OTHERS),
    ("broadcast", "ring"): (_whole, _OTHERS),
    ("broadcast", "tree"): (_half_sends(lambda n: 2), _steps(_depth)),
    ("send_recv", "ring"): (_whole, _steps(lambda n: 1)),
}
"""By kind and algorithm: bytes sent and steps, as functions of ranks n > 1 and buffer bytes."""

KINDS: Final = tuple(dict.fromkeys(kind for kind, _ in _FORMS))
"""The collectives that are modelled."""

_BUS_FACTOR: Final[Mapping[str, Callable[[Num], Num]]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    **dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all"), lambda n: (n - 1) / n),
    **dict.fromkeys(("broadcast", "send_recv"), lambda n: 0 * n + 1),
}


def algorithms(kind: str) -> tuple[str, ...]:
    """The algorithms that are modelled for a collective.

    >>> algorithms("all_reduce")
    ('ring', 'tree', 'nvls')
    """
    if kind not in KINDS:
        raise UnknownNameError("collective", kind, KINDS)
    return tuple(algorithm for k, algorithm in _FORMS if k == kind)


def _set_number(collective: Collective, name: str, *, least: int) -> None:
    """A finite number (or an array) of at least `least`."""
    value = getattr(collective, name)
    if type(value) is int and least <= value:
        return  # the common case, kept cheap
    rule = f"finite, at least {least}"
    number = checked_number(
        collective.kind, name, value, lambda n: (n >= least) & (n < math.inf), rule
    )
    object.__setattr__(collective, name, number)

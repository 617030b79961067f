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

and nothing at all for n = 1. Every row is executed by `simulate`, which passes real chunks from
rank to rank and counts; the tests hold both against each other.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError, UnknownNameError
from workloads.numeric import Num, any_true, as_num, ceil_div, floor, log2, minimum, where

Buffer: TypeAlias = NDArray[np.float64]
Message: TypeAlias = tuple[int, int, Buffer]
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


# ---- executed ------------------------------------------------------------------------------


@dataclass(slots=True)
class Wires:
    """Links between ranks: delivers messages round by round and counts what each rank sends."""

    num_ranks: int
    sent_bytes: list[int] = field(default_factory=list)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.sent_bytes = [0] * self.num_ranks

    def round(self, messages: Sequence[Message]) -> list[Message]:
        """One step: all messages leave together, then all arrive, as copies."""
        self.num_steps += 1
        for source, _, chunk in messages:
            self.sent_bytes[source] += chunk.size
        return [(source, target, chunk.copy()) for source, target, chunk in messages]


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What `simulate` did: every rank's result, what it sent, and the rounds it took."""

    results: tuple[Buffer, ...]
    sent_bytes: tuple[int, ...]
    num_steps: int


def simulate(kind: str, buffers: Sequence[Buffer], algorithm: str = "ring") -> Executed:
    """Run a collective on one buffer per rank, every element counted as one byte.

    Buffers: all_gather takes the shards in rank order (as equal as `shard_lengths` makes them),
    broadcast the root's buffer from rank 0, all others one buffer of num_bytes per rank. Results:
    reduce_scatter leaves shard i on rank i; all_to_all leaves the parts for rank i, in order of
    the ranks they came from; send_recv leaves what the rank before sent.

    >>> done = simulate("all_reduce", [np.arange(4.0), np.ones(4)])
    >>> done.results[0], done.sent_bytes, done.num_steps
    (array([1., 2., 3., 4.]), (4, 4), 2)
    """
    total = sum(b.size for b in buffers) if kind == "all_gather" else buffers[0].size
    Collective(kind, total, len(buffers), algorithm)  # refuses unknown names
    wires = Wires(len(buffers))
    if len(buffers) == 1:
        results = [buffers[0].copy()]
    else:
        results = _EXECUTE[kind, algorithm](wires, buffers)
    return Executed(
        results=tuple(results), sent_bytes=tuple(wires.sent_bytes), num_steps=wires.num_steps
    )


def shard_lengths(num_elements: int, num_ranks: int) -> tuple[int, ...]:
    """Elements of each rank's shard: ceil(num_elements / num_ranks), the last ones shorter.

    >>> shard_lengths(5, 4)
    (2, 2, 1, 0)
    """
    chunk = -(-num_elements // num_ranks)
    return tuple(max(0, min(chunk, num_elements - rank * chunk)) for rank in range(num_ranks))


def _padded(values: Buffer, num_parts: int) -> list[Buffer]:
    """Equal parts, the last ones filled up with zeros."""
    chunk = -(-values.size // num_parts)
    whole = np.zeros(chunk * num_parts)
    whole[: values.size] = values
    return [part.copy() for part in whole.reshape(num_parts, chunk)]


def _shift(
    wires: Wires, parts: list[list[Buffer]], step: int, *, add: bool, ahead: int = 0
) -> None:
    """One step of a ring: rank r passes part r + ahead - step on to rank r + 1."""
    n = wires.num_ranks
    messages = [(r, (r + 1) % n, parts[r][(r + ahead - step) % n]) for r in range(n)]
    for source, target, chunk in wires.round(messages):
        index = (source + ahead - step) % n
        parts[target][index] = parts[target][index] + chunk if add else chunk


def _ring_reduce_scatter(wires: Wires, parts: list[list[Buffer]]) -> None:
    """Partial sums travel the ring until part i is whole on rank i."""
    for step in range(wires.num_ranks - 1):
        _shift(wires, parts, step, add=True, ahead=-1)


def _ring_all_gather(wires: Wires, parts: list[list[Buffer]]) -> None:
    """Part i leaves rank i and travels the ring until every rank has it."""
    for step in range(wires.num_ranks - 1):
        _shift(wires, parts, step, add=False)


def _all_reduce_ring(wires: Wires, buffers: Sequence[Buffer]) -> list[Buffer]:
    parts = [_padded(b, wires.num_ranks) for b in buffers]
    _ring_reduce_scatter(wires, parts)
    _ring_all_gather(wires, parts)
    return [np.concatenate(p)[: buffers[0].size] for p in parts]


def _all_gather_ring(wires: Wires, buffers: Sequence[Buffer]) -> list[Buffer]:
    n, total = wires.num_ranks, sum(b.size for b in buffers)
    if tuple(b.size for b in buffers) != shard_lengths(total, n):
        raise InputError(f"all_gather: shards must hold {shard_lengths(total, n)} elements")
    parts = [[np.zeros(buffers[0].size) for _ in range(n)] for _ in range(n)]
    for rank, shard in enumerate(buffers):
        parts[rank][rank][: shard.size] = shard
    _ring_all_gather(wires, parts)
    return [np.concatenate(p)[:total] for p in parts]


def _reduce_scatter_ring(wires: Wires, buffers: Sequence[Buffer]) -> list[Buffer]:
    parts = [_padded(b, wires.num_ranks) for b in buffers]
    _ring_reduce_scatter(wires, parts)
    lengths = shard_lengths(buffers[0].size, wires.num_ranks)
    return [parts[rank][rank][:length] for rank, length in enumerate(lengths)]


def _all_to_all_shifts(wires: Wires, buffers: Sequence[Buffer]) -> list[Buffer]:
    n = wires.num_ranks
    parts = [_padded(b, n) for b in buffers]
    arrived = [[parts[r][r] if s == r else np.empty(0) for s in range(n)] for r in range(n)]
    for shift in range(1, n):
        messages = [(r, (r + shift) % n, parts[r][(r + shift) % n]) for r in range(n)]
        for source, target, chunk in wires.round(messages):
            arrived[target][source] = chunk
    lengths = shard_lengths(buffers[0].size, n)
    return [np.concatenate([c[: lengths[r]] for c in arrived[r]]) for r in range(n)]


def _broadcast_chain(wires: Wires, buffers: Sequence[Buffer]) -> list[Buffer]:
    held = [buffers[0].copy()]
    for rank in range(wires.num_ranks - 1):
        ((_, _, chunk),) = wires.round([(rank, rank + 1, held[rank])])
        held.append(chunk)
    return held


def _send_recv_shift(wires: Wires, buffers: Sequence[Buffer]) -> list[Buffer]:
    n = wires.num_ranks
    messages = [(r, (r + 1) % n, b) for r, b in enumerate(buffers)]
    arrived = {target: chunk for _, target, chunk in wires.round(messages)}
    return [arrived[r] for r in range(n)]


def _all_reduce_switch(wires: Wires, buffers: Sequence[Buffer]) -> list[Buffer]:
    """Rank i has part i pulled from every rank and summed in the switch, then multicasts it.

    In a round, the switch is where messages meet: it adds what it pulls and copies what it gets.
    """
    n = wires.num_ranks
    parts = [_padded(b, n) for b in buffers]
    pulled = wires.round([(r, owner, parts[r][owner]) for r in range(n) for owner in range(n)])
    sums = [sum(chunk for _, target, chunk in pulled if target == r) for r in range(n)]
    cast = wires.round([(owner, owner, np.asarray(total)) for owner, total in enumerate(sums)])
    whole = np.concatenate([chunk for _, _, chunk in cast])[: buffers[0].size]
    return [whole.copy() for _ in range(n)]


def two_trees(num_ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parents of every rank in two binary trees below rank 0 (which is its own parent).

    In the first, a rank's lowest set bit is its height: odd ranks are leaves, and a parent is
    the rank with that bit cleared and the next one set, or cleared only where that is past the
    end. The second is the first with ranks mirrored (an even number below the root) or shifted by
    one (an odd number), so that leaves of one have the children of the other.

    >>> two_trees(4)
    ((0, 2, 0, 2), (0, 3, 3, 0))
    """
    below = num_ranks - 1
    if below % 2 == 0:
        role = {rank: num_ranks - rank for rank in range(1, num_ranks)}
    else:
        role = {rank: (rank - 2) % below + 1 for rank in range(1, num_ranks)}
    rank_in = {place: rank for rank, place in role.items()} | {0: 0}
    first = [0] + [_parent(rank, num_ranks) for rank in range(1, num_ranks)]
    second = [0] + [rank_in[first[role[rank]]] for rank in range(1, num_ranks)]
    return tuple(first), tuple(second)


def _parent(rank: int, num_ranks: int) -> int:
    """The parent in the first tree: heights grow until the parent exists."""
    bit = rank & -rank
    up = (rank & ~bit) | (bit << 1)
    return up if up < num_ranks else rank & ~bit


def _levels(parents: Sequence[int]) -> list[list[int]]:
    """Ranks by distance from the root, the root left out."""
    distance = [0] * len(parents)
    for rank in range(1, len(parents)):
        at = rank
        while at:
            at, distance[rank] = parents[at], distance[rank] + 1
    deepest = max(distance)
    return [[r for r, d in enumerate(distance) if d == level] for level in range(1, deepest + 1)]


def _send_down(wires: Wires, halves: list[list[Buffer]]) -> None:
    """Both trees at once, level by level from the root."""
    trees = two_trees(wires.num_ranks)
    levels = [_levels(parents) for parents in trees]
    for level in range(len(levels[0])):
        steps = [(t, child) for t in (0, 1) for child in levels[t][level]]
        arrived = wires.round([(trees[t][c], c, halves[trees[t][c]][t]) for t, c in steps])
        for (tree, child), (_, _, chunk) in zip(steps, arrived, strict=True):
            halves[child][tree] = chunk


def _send_up(wires: Wires, halves: list[list[Buffer]]) -> None:
    """Both trees at once, level by level to the root; parents add."""
    trees = two_trees(wires.num_ranks)
    levels = [_levels(parents) for parents in trees]
    for level in reversed(range(len(levels[0]))):
        steps = [(t, child) for t in (0, 1) for child in levels[t][level]]
        arrived = wires.round([(c, trees[t][c], halves[c][t]) for t, c in steps])
        for (tree, _), (_, parent, chunk) in zip(steps, arrived, strict=True):
            halves[parent][tree] = halves[parent][tree] + chunk


def _all_reduce_tree(wires: Wires, buffers: Sequence[Buffer]) -> list[Buffer]:
    halves = [_padded(b, 2) for b in buffers]
    _send_up(wires, halves)
    _send_down(wires, halves)
    return [np.concatenate(h)[: buffers[0].size] for h in halves]


def _broadcast_tree(wires: Wires, buffers: Sequence[Buffer]) -> list[Buffer]:
    size = buffers[0].size
    halves = [_padded(b, 2) for b in (buffers[0], *(np.zeros(size) for _ in buffers[1:]))]
    _send_down(wires, halves)
    return [np.concatenate(h)[:size] for h in halves]


_EXECUTE: Final[Mapping[tuple[str, str], Callable[[Wires, Sequence[Buffer]], list[Buffer]]]] = {
    ("all_reduce", "ring"): _all_reduce_ring,
    ("all_reduce", "tree"): _all_reduce_tree,
    ("all_reduce", "nvls"): _all_reduce_switch,
    ("all_gather", "ring"): _all_gather_ring,
    ("reduce_scatter", "ring"): _reduce_scatter_ring,
    ("all_to_all", "ring"): _all_to_all_shifts,
    ("broadcast", "ring"): _broadcast_chain,
    ("broadcast", "tree"): _broadcast_tree,
    ("send_recv", "ring"): _send_recv_shift,
}


def _set_number(collective: Collective, name: str, *, least: int) -> None:
    """A finite number (or an array) of at least `least`."""
    value = getattr(collective, name)
    if type(value) is int and least <= value:
        return  # the common case, kept cheap
    try:
        number = as_num(value)
    except (TypeError, ValueError):
        raise InputError(f"{collective.kind}: {name} = {value!r} is not a number") from None
    if any_true(np.logical_not((number >= least) & (number < math.inf))):
        raise InputError(f"{collective.kind}: {name} = {value!r} must be finite, at least {least}")
    object.__setattr__(collective, name, number)

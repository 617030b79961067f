"""The collectives executed: real chunks passed from rank to rank in rounds, and counted.

What `collective` states in closed form is done here message by message, on one buffer per rank,
so that results and counts can both be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError
from workloads.ops.collective import Collective

Buffer: TypeAlias = NDArray[np.float64]
Message: TypeAlias = tuple[int, int, Buffer]


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

"""Where tensors lie in one stretch of memory: dynamic storage allocation, with a proof.

Tensor i of S_i bytes lives in [s_i, e_i) and gets an address A_i:

    min  M
    s.t. A_i + S_i <= M,   A_i >= 0                                                          (1)
         A_i + S_i <= A_j  or  A_j + S_j <= A_i       for all i, j that share time           (2)
    M >= max_t sum_(i lives at t) S_i =: live bytes                                          (3)

First fit takes the tensors in some order, each at the lowest address that is free all its life.
Orders tried: by size, life, area, start; and *across the peak*: the tensors alive at the moment of
most bytes first, so that they stack without a hole, by start, end or reach, since a stack sorted by
start leaves one hole before the peak (by end: after it) which the others fill by distance from the
peak, size or area. If none meets (3), `storage_search` builds stacks that waste no more than the
peak allows, by rules that it varies. Meeting (3) ends the search: that is the proof. Else `proved`
asks a solver for (1) and (2): HiGHS or CBC for up to about 40 tensors, CP-SAT for more.

**Two levels** (MEMO, arXiv 2407.12117, section 4.2): tensors that live within one pass of a layer
are placed once for every kind of pass; the pass then stands as one tensor of their peak among the
rest. Thousands of requests fall into a few small problems.

    Implemented in: `Tensors.live_bytes` (3), `_FirstFit` (order to addresses), `orders`,
    `_searched`, `program` (1, 2), `proved`, `place_in_passes` (two levels).

Ignored: memory that a device maps in pages, which needs no stretch; alignment, unless sizes are
rounded up first (`Tensors.aligned`).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError
from simulator.memory_timeline import Timeline
from simulator.planners.program import (
    AT_MOST,
    CP_SAT,
    FEASIBLE,
    INFEASIBLE,
    OPTIMAL,
    Box,
    Program,
    Row,
    Solution,
    Variable,
    gap_frac,
    solve,
)
from simulator.planners.storage_search import Ints, best_stack

SEARCH_S: Final = 3.0
"""Time of a search that does not meet the bound, in seconds of one core."""
NUM_PEAKS: Final = 3
"""Moments of most live bytes that stacks are built across."""
LEAST_S: Final = 0.1
"""Time that is left to a solver whatever the first question took."""
TOP: Final = "peak"


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Sizes in bytes and lives [start, end) in event numbers; `kinds` group them in charts."""

    names: tuple[str, ...]
    sizes: Ints
    starts: Ints
    ends: Ints
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len({len(self.names), len(self.sizes), len(self.starts), len(self.ends)}) != 1:
            raise InputError("tensors need as many names, sizes, starts and ends; give one of each")
        for name, size, start, end in zip(
            self.names, self.sizes.tolist(), self.starts.tolist(), self.ends.tolist(), strict=True
        ):
            if size < 1 or end <= start:
                raise InputError(
                    f"tensor '{name}': {size} bytes from {start} to {end}; "
                    "give at least a byte and an end after the start"
                )

    @staticmethod
    def of(timeline: Timeline) -> Tensors:
        """Lives of a timeline's tensors; what is never freed lives to the end."""
        open_: dict[Hashable, int] = {}
        rows: list[list[int]] = []
        names, kinds = [], []
        for at, event in enumerate(timeline.events):
            if event.num_bytes > 0:
                open_[event.name] = len(rows)
                rows.append([int(np.ceil(event.num_bytes)), at, len(timeline.events)])
                names.append(_text(event.name))
                kinds.append(event.kind)
            else:
                rows[open_.pop(event.name)][2] = at
        sizes, starts, ends = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        return Tensors(
            names=tuple(names), sizes=sizes, starts=starts, ends=ends, kinds=tuple(kinds)
        )

    def __len__(self) -> int:
        return len(self.names)

    def aligned(self, num_bytes: int) -> Tensors:
        """Sizes rounded up to whole multiples, as allocators give them out."""
        return dataclasses.replace(self, sizes=-(-self.sizes // num_bytes) * num_bytes)

    def picked(self, which: Ints) -> Tensors:
        """Some of them."""
        return Tensors(
            names=tuple(self.names[i] for i in which), sizes=self.sizes[which],
            starts=self.starts[which], ends=self.ends[which],
            kinds=tuple(self.kinds[i] for i in which) if self.kinds else (),
        )  # fmt: skip

    @cached_property
    def live(self) -> tuple[Ints, Ints]:
        """Event numbers at which something changes, and the bytes alive from each on."""
        moments, at = np.unique(np.concatenate([self.starts, self.ends]), return_inverse=True)
        change = np.concatenate([self.sizes, -self.sizes])
        total = np.zeros(len(moments), dtype=np.int64)
        np.add.at(total, at, change)
        return moments, np.cumsum(total)

    @property
    def live_bytes(self) -> int:
        """Most bytes alive at once: no placement needs fewer."""
        return int(self.live[1].max()) if len(self) else 0


def _text(name: Hashable) -> str:
    return ".".join(map(str, name)) if isinstance(name, tuple) else str(name)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Addresses in bytes; `lower_bytes` is proven, `method` tells what found them."""

    tensors: Tensors
    addresses: Ints
    lower_bytes: int
    method: str
    solve_s: float

    @property
    def peak_bytes(self) -> int:
        """Memory that the placement needs."""
        return int((self.addresses + self.tensors.sizes).max(initial=0))

    @property
    def gap_frac(self) -> float:
        """How far it may be from the best placement."""
        return gap_frac(self.peak_bytes, self.lower_bytes)

    @property
    def above_live_frac(self) -> float:
        """Bytes beyond the live bytes, over those."""
        live = self.tensors.live_bytes
        return self.peak_bytes / live - 1 if live else 0.0

    @property
    def status(self) -> str:
        """Optimal where the peak is the proven bound."""
        return OPTIMAL if self.peak_bytes == self.lower_bytes else FEASIBLE

    def overlaps(self) -> Iterator[tuple[str, str]]:
        """Pairs of tensors that share a byte and a moment: there are none."""
        t = self.tensors
        tops = self.addresses + t.sizes
        for i in range(len(t)):
            same = (t.starts[:i] < t.ends[i]) & (t.starts[i] < t.ends[:i])
            beside = (self.addresses[:i] < tops[i]) & (self.addresses[i] < tops[:i])
            yield from ((t.names[j], t.names[i]) for j in np.flatnonzero(same & beside))


# ---- first fit -----------------------------------------------------------------------------------


class _FirstFit:
    """Addresses from an order: each tensor at the lowest place that is free all its life."""

    def __init__(self, tensors: Tensors) -> None:
        self.sizes = tensors.sizes
        self.starts, self.ends = tensors.starts, tensors.ends
        self.rows = list(
            zip(self.sizes.tolist(), self.starts.tolist(), self.ends.tolist(), strict=True)
        )

    def placed(self, order: Ints) -> tuple[int, Ints]:
        """The peak and the addresses."""
        block = np.zeros((4, len(self.rows)), dtype=np.int64)  # lowest byte, top, start, end
        low, top, start, end = block
        addresses, peak = np.zeros(len(order), dtype=np.int64), 0
        for k, i in enumerate(order.tolist()):
            size, begin, stop = self.rows[i]
            beside = start[:k] < stop
            beside &= end[:k] > begin
            at = _lowest(low[:k][beside], top[:k][beside], size)
            p = int(low[:k].searchsorted(at, side="right"))
            block[:, p + 1 : k + 1] = block[:, p:k]
            block[:, p] = at, at + size, begin, stop
            addresses[i] = at
            peak = max(peak, at + size)
        return peak, addresses


def _lowest(low: Ints, top: Ints, size: int) -> int:
    """The lowest gap of that size between stretches sorted by their start."""
    if not len(low) or low[0] >= size:
        return 0
    reached = np.maximum.accumulate(top)
    fits = low[1:] - reached[:-1] >= size
    k = int(fits.argmax()) if len(fits) else 0
    return int(reached[k]) if len(fits) and fits[k] else int(reached[-1])


def orders(tensors: Tensors) -> Iterator[tuple[str, Ints]]:
    """Orders to try, the cheapest to explain first."""
    size, life = tensors.sizes, tensors.ends - tensors.starts
    area = size.astype(np.float64) * life
    yield "by size", np.lexsort((-life, -size))
    yield "by life", np.lexsort((-size, -life))
    yield "by area", np.lexsort((-life, -area))
    yield "by start", np.lexsort((-size, tensors.starts))
    for rank, moment in enumerate(_peaks(tensors)):
        yield from _across(tensors, moment, rank)


def _peaks(tensors: Tensors) -> list[int]:
    """The moments of most live bytes that share no tensor's start or end, most bytes first."""
    moments, live = tensors.live
    found: list[int] = []
    for k in np.argsort(-live, kind="stable").tolist():
        alive = (tensors.starts <= moments[k]) & (tensors.ends > moments[k])
        if not any(_alike(tensors, alive, m) for m in found):
            found.append(int(moments[k]))
        if len(found) == NUM_PEAKS:
            break
    return found


def _alike(tensors: Tensors, alive: NDArray[np.bool_], moment: int) -> bool:
    """Do the tensors alive at a moment make up most of those alive?"""
    other = (tensors.starts <= moment) & (tensors.ends > moment)
    shared = int(tensors.sizes[alive & other].sum())
    return 2 * shared > int(tensors.sizes[alive].sum())


def _across(tensors: Tensors, moment: int, rank: int) -> Iterator[tuple[str, Ints]]:
    """Orders that stack the tensors alive at a moment first."""
    s, e, size = tensors.starts, tensors.ends, tensors.sizes
    before, after = moment - s, e - moment
    alive = (before >= 0) & (after > 0)
    stack, rest = np.flatnonzero(alive), np.flatnonzero(~alive)
    stacked = {
        "reach": -np.minimum(before, after), "late start": before, "early start": -before,
        "late end": -after, "early end": after, "middle": after - before,
    }  # fmt: skip
    filled = {
        "distance": np.where(s > moment, s - moment, moment - e),
        "size": -size,
        "area": -size.astype(np.float64) * (e - s),
    }
    place = "the peak" if rank == 0 else f"peak {rank + 1}"
    for first, key in stacked.items():
        for then, other in filled.items():
            order = [
                stack[np.lexsort((-size[stack], key[stack]))],
                rest[np.lexsort((-size[rest], other[rest]))],
            ]
            yield f"across {place} by {first}, rest by {then}", np.concatenate(order)


# ---- the search ----------------------------------------------------------------------------------


def place(
    tensors: Tensors, *, time_limit_s: float = SEARCH_S, gap_frac: float = 0.0, seed: int = 0
) -> Placement:
    """The best placement found, at once where first fit meets the live bytes.

    >>> t = Tensors(names=("a", "b", "c"), sizes=np.array([4, 2, 4]), starts=np.array([0, 0, 2]),
    ...     ends=np.array([2, 4, 4]))
    >>> found = place(t)
    >>> found.addresses.tolist(), found.peak_bytes, found.status
    ([0, 4, 0], 6, 'optimal')
    """
    begin = time.process_time()
    if not len(tensors):
        raise InputError("there is no tensor to place; give at least one")
    fit, lower = _FirstFit(tensors), tensors.live_bytes
    goal, until = int(lower * (1 + gap_frac)), begin + time_limit_s
    best = _Placed("", sys.maxsize, np.empty(0, dtype=np.int64))
    for name, order in orders(tensors):
        peak, addresses = fit.placed(order)
        if peak < best.peak:
            best = _Placed(name, peak, addresses)
        if best.peak <= goal or time.process_time() > until:
            break
    else:
        best = _searched(fit, best, goal, until, seed)
    return Placement(
        tensors=tensors, addresses=best.addresses, lower_bytes=lower, method=best.name,
        solve_s=time.process_time() - begin,
    )  # fmt: skip


class _Placed(NamedTuple):
    """What an order or a search found."""

    name: str
    peak: int
    addresses: Ints


def _searched(fit: _FirstFit, best: _Placed, goal: int, until_s: float, seed: int) -> _Placed:
    """The better of what stands and a stack that is searched for, pressed down by first fit."""
    found = best_stack(
        fit.sizes, fit.starts, fit.ends, peak=best.peak, goal=goal, until_s=until_s, seed=seed
    )
    if found is None:
        return best
    peak, addresses = fit.placed(np.argsort(found.addresses, kind="stable"))
    return _Placed("stacked by rules that waste least", peak, addresses)


# ---- proofs by a solver --------------------------------------------------------------------------


def program(tensors: Tensors, most_bytes: int) -> Program:
    """(1) and (2) with whole addresses and a peak of at most `most_bytes`."""
    sizes = tensors.sizes.tolist()
    places = [f"A[{i}]" for i in range(len(tensors))]
    variables = [Variable(TOP, float(tensors.live_bytes), float(most_bytes), True)]
    variables += [
        Variable(name, 0.0, float(most_bytes - size), True)
        for name, size in zip(places, sizes, strict=True)
    ]
    rows = [
        Row(f"{label}[{i}] below the peak", {places[i]: 1.0, TOP: -1.0}, AT_MOST, -float(sizes[i]))
        for i, label in enumerate(tensors.names)
    ]
    boxes = [
        Box(start=places[i], size=float(sizes[i]), begin=float(tensors.starts[i]),
            end=float(tensors.ends[i]))
        for i in range(len(tensors))
    ]  # fmt: skip
    return Program(
        name="storage", variables=tuple(variables), rows=tuple(rows), boxes=tuple(boxes),
        objective={TOP: 1.0},
    )  # fmt: skip


def proved(
    found: Placement, *, engine: str | None = None, time_limit_s: float = 60.0
) -> tuple[Placement, Solution]:
    """A placement with what a solver proves of it, and the solver's answer.

    The solver starts from the placement and may find a better one; the bound is the better of its
    own and the live bytes. CP-SAT is first asked, for half of the time, whether the live bytes are
    enough: a peak that is given leaves it far less to try.
    """
    begin = time.perf_counter()
    if engine == CP_SAT and found.peak_bytes > found.lower_bytes:
        question = program(found.tensors, found.lower_bytes)
        answer = solve(question, engine=engine, time_limit_s=time_limit_s / 2, explain=False)
        if answer.has_point:
            return _better(found, answer, begin), answer
        if answer.status == INFEASIBLE:
            found = dataclasses.replace(found, lower_bytes=found.lower_bytes + 1)
    hint = {f"A[{i}]": float(a) for i, a in enumerate(found.addresses.tolist())}
    hint[TOP] = float(found.peak_bytes)
    left_s = max(begin + time_limit_s - time.perf_counter(), LEAST_S)
    answer = solve(
        program(found.tensors, found.peak_bytes), engine=engine, time_limit_s=left_s, hint=hint,
        explain=False,
    )  # fmt: skip
    return _better(found, answer, begin), answer


def _better(found: Placement, answer: Solution, begin: float) -> Placement:
    """The placement with the solver's addresses and bound where those are better."""
    addresses, method = found.addresses, found.method
    if answer.has_point and answer.objective < found.peak_bytes:
        values = [round(answer.values[f"A[{i}]"]) for i in range(len(found.tensors))]
        addresses, method = np.array(values, dtype=np.int64), f"{method}, then {answer.engine}"
    bound = answer.bound if np.isfinite(answer.bound) else 0.0
    return Placement(
        tensors=found.tensors, addresses=addresses, method=method,
        lower_bytes=max(found.lower_bytes, int(np.ceil(bound - 1e-6))),
        solve_s=found.solve_s + time.perf_counter() - begin,
    )  # fmt: skip


# ---- two levels ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TwoLevels:
    """`whole` places every tensor; `kinds` counts the different passes that were solved."""

    whole: Placement
    outer: Placement
    num_passes: int
    num_kinds: int
    inner: tuple[Placement, ...]


def place_in_passes(
    tensors: Tensors,
    passes: Sequence[tuple[int, int]],
    *,
    time_limit_s: float = SEARCH_S,
    gap_frac: float = 0.0,
    seed: int = 0,
) -> TwoLevels:
    """Two levels: what lives within one of `passes` (windows of events) first, then the rest.

    Half of the time may go to the passes, each kind of which is solved once.
    """
    begin = time.process_time()
    windows = sorted(passes)
    if any(a[1] > b[0] for a, b in itertools.pairwise(windows)):
        raise InputError("passes overlap in time; give windows that follow one another")
    members = [_within(tensors, window) for window in windows]
    outside = np.setdiff1d(np.arange(len(tensors)), np.concatenate([*members, [-1]]))
    solved: dict[bytes, Placement] = {}
    keys = []
    options = {"gap_frac": gap_frac, "seed": seed}
    kept = [(m, w) for m, w in zip(members, windows, strict=True) if len(m)]
    for which, window in kept:
        part = tensors.picked(which)
        key = np.stack([part.sizes, part.starts - window[0], part.ends - window[0]]).tobytes()
        keys.append(key)
        if key not in solved:
            left = max(time_limit_s / 2 - (time.process_time() - begin), 0.0)
            solved[key] = place(part, time_limit_s=left, **options)  # type: ignore[arg-type]
    blocks = Tensors(
        names=(*(tensors.names[i] for i in outside), *(f"pass {k}" for k in range(len(kept)))),
        sizes=np.concatenate([tensors.sizes[outside], _of(solved[k].peak_bytes for k in keys)]),
        starts=np.concatenate([tensors.starts[outside], _of(w[0] for _, w in kept)]),
        ends=np.concatenate([tensors.ends[outside], _of(w[1] for _, w in kept)]),
    )
    left = max(time_limit_s - (time.process_time() - begin), 0.0)
    outer = place(blocks, time_limit_s=left, **options)  # type: ignore[arg-type]
    addresses = np.zeros(len(tensors), dtype=np.int64)
    addresses[outside] = outer.addresses[: len(outside)]
    for (which, _), key, base in zip(kept, keys, outer.addresses[len(outside) :], strict=True):
        addresses[which] = base + solved[key].addresses
    whole = Placement(
        tensors=tensors, addresses=addresses, lower_bytes=tensors.live_bytes,
        method=f"two levels: {outer.method}", solve_s=time.process_time() - begin,
    )  # fmt: skip
    return TwoLevels(
        whole=whole, outer=outer, num_passes=len(kept), num_kinds=len(solved),
        inner=tuple(solved.values()),
    )  # fmt: skip


def _within(tensors: Tensors, window: tuple[int, int]) -> Ints:
    return np.flatnonzero((tensors.starts >= window[0]) & (tensors.ends <= window[1]))


def _of(values: Iterator[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)

"""Where to cut a step's sequences into micro-batches: least time, not least tokens.

Sequences in descending order of length are cut into runs. With L seconds for a group of d ranks
(the makespan less what every micro-batch takes), a sequence k that groups of size d may hold is
worth there

    worth_kd(L) = d ( mix w_kd / L + (1 - mix) s_k / (d rank_tokens) ),    mix of `MIXES`      (1)
    worth_kd(L) = d [w_kd / L > 1/2],  likewise by room                                        (2)

and no group of d ranks holds more than d of it, nor N ranks more than N: a run whose worths, each
at its cheapest size, add up to more than N takes longer than L. That is the bound of `group_bound`
with a few fixed prices, which sums of prefixes give for all runs at once, on a grid of makespans
`STEP_FRAC` apart. With low(i, j) the bound of the run from place i to place j

    V(i) = min_j  low(i, j) + V(j),      V(end) = 0                                            (3)

is what no step over runs of adjacent lengths undercuts, whatever its groups. Runs on the cheapest
way are given `group_bound`'s own bound, which holds for every longer run as well, until time is up.

A cut to run is (3) over times instead of bounds: runs that were planned take what their plan takes,
all others their bound times the ratio of the nearest planned run; what (3) picks is planned, until
it picks nothing new.

Source: FlexSP's blaster (arXiv 2412.01523, section 4.1.3: sorted, the fullest micro-batch least),
with time in the place of tokens; (2) as dual feasible functions (Fekete and Schepers 2001, u^(1)).
Implemented in: `bounds_of` (1, 2), `cheapest` (3), `lower_step_s`, `time_cut`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from simulator.planners.group_bound import lower_bound_s
from simulator.variable_length import Floats, GroupCost, Ints

STEP_FRAC: Final = 0.01
"""Distance of makespans on the grid."""
MIXES: Final = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Price of time; the rest of 1 is that of room."""
LEAST_FRAC: Final = 1e-3
"""Least makespan of the grid over what all sequences would take with nothing idle."""
MOST_PLACES: Final = 96
"""Places at which may be cut, beside those of the cuts that are given."""
MOST_EXACT: Final = 1024
"""Sequences up to which the bound of all cuts is computed."""
SAFE_FRAC: Final = 1e-9
"""Rounding of prefix sums, on the safe side."""
TINY_S: Final = 1e-12
MOST_ROUNDS: Final = 200


@dataclass(frozen=True)
class Bounds:
    """`low_s[i, j]`: the run from place i to place j takes longer; infinite where j <= i.

    `ordered` are the lengths, longest first; `places[i]` of them lie before place i.
    """

    ordered: Ints
    places: Ints
    low_s: Floats

    def run(self, i: int, j: int) -> Ints:
        """The lengths from place i to place j."""
        return self.ordered[self.places[i] : self.places[j]]

    def raise_to(self, i: int, j: int, seconds: float) -> None:
        """A bound of one run holds for all runs that hold it."""
        wider = self.low_s[: i + 1, j:]
        np.maximum(wider, seconds, out=wider)


def bounds_of(held: Ints, cost: GroupCost, num_ranks: int, places: Ints | None = None) -> Bounds:
    """(1) and (2) for every run between places, all of them where none are given."""
    ordered = np.sort(held)[::-1]
    places = np.arange(len(held) + 1) if places is None else places
    sizes = [d for d in cost.degrees if d <= num_ranks]
    rooms = np.stack([ordered / cost.capacity_tokens(d) for d in sizes])
    weights = np.stack([cost.weight_s(ordered, d) for d in sizes])
    weights = np.where(rooms <= 1, weights, np.inf)
    shares = np.array(sizes, dtype=np.float64)[:, None]
    spans = _grid(weights, shares, num_ranks)
    ends = np.stack([_ends(weights / span, rooms, shares, num_ranks, places) for span in spans])
    ends = np.maximum.accumulate(ends, axis=0)
    below = np.append(np.concatenate([[0.0], spans[:-1]]), np.inf) + cost.fixed_s
    low = np.full((len(places), len(places)), np.inf)
    for i in range(len(places) - 1):
        low[i, i + 1 :] = below[np.searchsorted(ends[:, i], places[i + 1 :])]
    return Bounds(ordered=ordered, places=places, low_s=low)


def places_of(cuts: list[list[Ints]], num: int) -> Ints:
    """Some places spread evenly over so many sequences, and those of the cuts."""
    even = np.linspace(0, num, min(num, MOST_PLACES) + 1).astype(np.int64)
    given = [np.cumsum([len(part) for part in cut]) for cut in cuts]
    return np.unique(np.concatenate([even, *given]))


def _grid(weights: Floats, shares: Floats, num_ranks: int) -> Floats:
    """Makespans up to one at which only room limits a run."""
    work = np.where(np.isfinite(weights), weights * shares, np.inf).min(axis=0)
    alone = weights.min(axis=0)
    low = max(float(alone.min()), LEAST_FRAC * float(work.sum()) / num_ranks, TINY_S)
    most = np.where(np.isfinite(weights), weights, 0.0).max()
    high = 2 * max(float(work.sum()), float(most), low)
    num = math.ceil(math.log(high / low) / math.log1p(STEP_FRAC)) + 1
    return np.asarray(low * (1 + STEP_FRAC) ** np.arange(num))


def _ends(parts: Floats, rooms: Floats, shares: Floats, num_ranks: int, places: Ints) -> Ints:
    """How many sequences lie before the furthest end of a run from each place."""
    fits, count = parts <= 1, parts.shape[1]
    stops = np.append(np.flatnonzero(~fits.any(axis=0)), count)
    ends: Ints = stops[np.searchsorted(stops, places)]
    time_part, room_part = np.where(fits, parts, 0.0), np.where(fits, rooms, 0.0)
    tables = [mix * time_part + (1 - mix) * room_part for mix in MIXES]
    tables += [(part > 1 / 2).astype(np.float64) for part in (time_part, room_part)]
    for table in tables:
        worth = np.where(fits, table * shares, np.inf).min(axis=0)
        sums = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(worth), worth, 0.0))])
        most = (sums[places] + num_ranks) * (1 + SAFE_FRAC)
        ends = np.minimum(ends, np.searchsorted(sums, most, side="right") - 1)
    return ends


def cheapest(costs: Floats) -> tuple[float, list[tuple[int, int]]]:
    """(3): the least sum over runs that follow each other from the first place to the last.

    >>> cheapest(np.array([[np.inf, 1.0, 5.0], [np.inf, np.inf, 3.0], [np.inf] * 3]))
    (4.0, [(0, 1), (1, 2)])
    """
    last = len(costs) - 1
    worth, to = np.zeros(last + 1), np.zeros(last + 1, dtype=np.int64)
    for i in range(last - 1, -1, -1):
        tried = costs[i, i + 1 :] + worth[i + 1 :]
        to[i] = i + 1 + int(tried.argmin())
        worth[i] = tried.min()
    runs, at = [], 0
    while at < last:
        runs.append((at, int(to[at])))
        at = int(to[at])
    return float(worth[0]), runs


def lower_step_s(held: Ints, cost: GroupCost, num_ranks: int, *, time_limit_s: float) -> float:
    """No step over micro-batches of adjacent lengths takes less, however cut and grouped.

    0 (nothing proven) for more sequences than `MOST_EXACT`.
    """
    if len(held) > MOST_EXACT:
        return 0.0
    end = time.perf_counter() + time_limit_s
    done: set[tuple[int, int]] = set()
    bounds = bounds_of(held, cost, num_ranks)
    low_s, runs = cheapest(bounds.low_s)
    while time.perf_counter() < end and not done.issuperset(runs):
        for run in [run for run in runs if run not in done]:
            left_s = end - time.perf_counter()
            if left_s > 0:
                done.add(run)
                part, upper_s = bounds.run(*run), 2 * float(bounds.low_s[run])
                found = lower_bound_s(part, cost, num_ranks, upper_s=upper_s, time_limit_s=left_s)
                bounds.raise_to(*run, found.seconds)
        low_s, runs = cheapest(bounds.low_s)
    return low_s


def time_cut(
    bounds: Bounds,
    seconds: Callable[[Ints], float],
    cuts: list[list[Ints]],
    *,
    time_limit_s: float,
) -> list[Ints]:
    """Runs whose plans take least together, as `seconds` plans them (infinite: it cannot).

    `cuts` are planned first. Empty where no cut was planned whole before the time was up.
    """
    end = time.perf_counter() + time_limit_s
    planned: dict[tuple[int, int], float] = {}
    best: tuple[float, list[tuple[int, int]]] = (math.inf, [])
    waiting = [_runs_of(bounds, cut) for cut in cuts]
    for _ in range(MOST_ROUNDS):
        runs = waiting.pop() if waiting else cheapest(_expected(bounds.low_s, planned))[1]
        new = [run for run in runs if run not in planned]
        for run in new:
            if time.perf_counter() >= end:
                return [bounds.run(*r) for r in best[1]]
            planned[run] = seconds(bounds.run(*run))
        total = sum(planned[run] for run in runs)
        best = (total, runs) if total < best[0] else best
        if not new and not waiting:
            break
    return [bounds.run(*run) for run in best[1]]


def _runs_of(bounds: Bounds, cut: list[Ints]) -> list[tuple[int, int]]:
    """A cut by its places."""
    stops = np.searchsorted(bounds.places, np.cumsum([0, *(len(part) for part in cut)])).tolist()
    return list(itertools.pairwise(stops))


def _expected(low_s: Floats, planned: dict[tuple[int, int], float]) -> Floats:
    """What runs take: as planned, else their bound times the nearest planned run's ratio."""
    known = {run: took for run, took in planned.items() if math.isfinite(low_s[run] + took)}
    expected = low_s.copy()
    if known:
        runs = np.array(list(known))
        ratios = np.array(list(known.values())) / low_s[runs[:, 0], runs[:, 1]]
        index = np.arange(len(low_s))
        far = np.abs(index[:, None, None] - runs[:, 0]) + np.abs(index[None, :, None] - runs[:, 1])
        expected *= ratios[far.argmin(axis=2)]
    for run, took in planned.items():
        expected[run] = took
    return expected

"""Hybrid data parallelism searched further, and what no schedule of it undercuts.

ByteScale's balance scheduler (`hybrid_data`) gives the longest units first to the ranks that are
free soonest. Here rings may also be longer than memory asks (the fewest ranks that end a sequence
by a target) and packs of short sequences less full, where ranks would stay idle; and the same list
scheduling is tried in other orders until the gap or the time asked for is reached: by seconds, by
ranks x seconds, by ranks, then these with a little noise from a fixed seed. Two bounds stand
against it. For units as they are, their ranks and times T_j, D_j:

    min   C
    s.t.  sum_r x_jr = D_j                  every unit on so many ranks                        (1)
          fixed + sum_j T_j x_jr <= C       every rank, starts of a unit's ranks left free     (2)
          x_jr in {0, 1}

whose relaxation is max(max T_j, sum D_j T_j / N) and which is solved where it is small. For every
choice of ranks, long sequences each on a ring of their own, short ones on a rank:

    C >= fixed + max( sum_k min_D D T_k(D) / N,  max_k min_D T_k(D) ),   D from least to N     (3)

as a rank's packs take the sum of what their sequences take alone.

Source: ByteScale (arXiv 2502.21231, algorithm 2); (1) and (2) as Graham's bound with gangs.
Implemented in: `plan_hybrid`, `unit_program` (1, 2), `lower_of_all_s` (3).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from simulator.planners.hybrid_data import RingCost, Schedule, Unit, hybrid_step, unit_of, within
from simulator.planners.program import AT_MOST, EQUAL, Program, Row, Variable, solve
from simulator.planners.sequence_groups import best_fit
from simulator.variable_length import Floats, Ints

MOST_CHOICES: Final = 2_000
"""Units times ranks up to which (1) and (2) are solved for their bound."""
TARGETS: Final = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
"""Ends of long sequences over the bound."""
ROOMS: Final = (1.0, 0.5, 0.25, 0.125)
"""Parts of a rank's room that packs of short sequences fill."""
MOST_ORDERS: Final = 2_000
NOISE: Final = 0.15
"""Spread of ln(priority) in orders that are drawn."""
SEARCH_SHARE: Final = 0.5
"""Part of the time that the search may take; the bound has the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridPlan:
    """The best schedule found, ByteScale's, and both bounds (`units_lower_s` for these units)."""

    schedule: Schedule
    balanced: Schedule
    units_lower_s: float
    lower_s: float
    solve_s: float

    @property
    def seconds(self) -> float:
        """The best schedule's time."""
        return self.schedule.seconds

    @property
    def gap_frac(self) -> float:
        """(time - bound) / bound over every choice of ranks."""
        return self.seconds / self.lower_s - 1

    @property
    def units_gap_frac(self) -> float:
        """The same for units as they are."""
        return self.seconds / self.units_lower_s - 1


def plan_hybrid(
    held: Ints,
    cost: RingCost,
    *,
    num_ranks: int,
    rank_tokens: int,
    offload: bool = True,
    gap_frac: float = 0.0,
    time_limit_s: float = 5.0,
) -> HybridPlan:
    """ByteScale's schedule, its units in better orders, and how far that is from the bounds."""
    begin = time.perf_counter()
    found = hybrid_step(
        held, cost, num_ranks=num_ranks, rank_tokens=rank_tokens, offload=offload
    )  # fmt: skip
    low = lower_of_all_s(
        held, cost, num_ranks=num_ranks, rank_tokens=rank_tokens, offload=offload
    )  # fmt: skip
    given: dict[str, Any] = {"rank_tokens": rank_tokens, "offload": offload, "low_s": low}
    wider = _widened(held, cost, found, gap_frac, begin + SEARCH_SHARE * time_limit_s / 2, **given)
    better = _reordered(wider, low * (1 + gap_frac), begin + SEARCH_SHARE * time_limit_s)
    units_low = better.lower_s
    left_s = begin + time_limit_s - time.perf_counter()
    few = len(better.units) * num_ranks <= MOST_CHOICES
    if better.seconds > units_low * (1 + gap_frac) and few and left_s > 0:
        answer = solve(unit_program(better), time_limit_s=left_s, gap_frac=gap_frac, explain=False)
        units_low = max(units_low, answer.bound if answer.has_point else units_low)
    return HybridPlan(
        schedule=better,
        balanced=found,
        units_lower_s=min(units_low, better.seconds),
        lower_s=min(low, better.seconds),
        solve_s=time.perf_counter() - begin,
    )


def lower_of_all_s(
    held: Ints, cost: RingCost, *, num_ranks: int, rank_tokens: int, offload: bool = True
) -> float:
    """(3): lengths that are alike are asked once."""
    lengths, counts = np.unique(held, return_counts=True)
    least = cost.ranks(lengths, rank_tokens, offload=offload)
    areas, alone = np.empty(len(lengths)), np.empty(len(lengths))
    for k, (length, low) in enumerate(zip(lengths.tolist(), least.tolist(), strict=True)):
        most = num_ranks if length > rank_tokens else 1
        degrees = np.arange(min(low, num_ranks), most + 1)
        took = cost.unit_s(float(length), float(length) ** 2, degrees)
        areas[k], alone[k] = (degrees * took).min(), took.min()
    return cost.fixed_s + max(float(areas @ counts) / num_ranks, float(alone.max()))


def _widened(
    held: Ints, cost: RingCost, found: Schedule, gap_frac: float, end: float, *,
    rank_tokens: int, offload: bool, low_s: float,
) -> Schedule:  # fmt: skip
    """The best over targets for long sequences and rooms for packs of short ones."""
    best, num_ranks = found, found.num_ranks
    least = np.minimum(cost.ranks(held, rank_tokens, offload=offload), num_ranks)
    most = np.full(len(held), num_ranks)
    long = np.flatnonzero(held > rank_tokens)
    short = np.flatnonzero(held <= rank_tokens)
    for target in TARGETS:
        deadline_s = low_s * target - cost.fixed_s
        degrees = within(held[long], cost, least[long], most[long], deadline_s)
        rings = [
            unit_of(held, np.array([k]), int(d), cost) for k, d in zip(long, degrees, strict=True)
        ]
        for part in ROOMS if len(short) else ROOMS[:1]:
            if best.seconds <= low_s * (1 + gap_frac) or time.perf_counter() >= end:
                return best
            room = max(part * rank_tokens, float(held[short].max())) if len(short) else 0.0
            packs = best_fit(held[short], room) if len(short) else []
            units = [*rings, *(unit_of(held, short[pack], 1, cost) for pack in packs)]
            tried = _in_order(sorted(units, key=lambda unit: -unit.seconds), found)
            best = tried if tried.seconds < best.seconds else best
    return best


def _reordered(found: Schedule, enough_s: float, end: float) -> Schedule:
    """The best of list schedules in other orders."""
    units = found.units
    took = np.array([unit.seconds for unit in units])
    ranks = np.array([float(unit.degree) for unit in units])
    keys: list[Floats] = [took, took * ranks, ranks + took / (2 * took.max())]
    rng, best = np.random.default_rng(0), found
    enough = max(enough_s, found.lower_s) * (1 + 1e-12)
    for turn in range(MOST_ORDERS):
        if best.seconds <= enough or time.perf_counter() >= end:
            break
        key = keys[turn % len(keys)]
        if turn >= len(keys):
            key = key * np.exp(rng.normal(0.0, NOISE, len(key)))
        tried = _in_order([units[j] for j in np.argsort(-key, kind="stable")], found)
        best = tried if tried.seconds < best.seconds else best
    return best


def _in_order(units: list[Unit], like: Schedule) -> Schedule:
    """Units one by one, each to the ranks that are free soonest."""
    free = np.zeros(like.num_ranks)
    starts, taken = np.zeros(len(units)), []
    for j, unit in enumerate(units):
        ranks = np.argpartition(free, unit.degree - 1)[: unit.degree]
        starts[j] = free[ranks].max()
        free[ranks] = starts[j] + unit.seconds
        taken.append(np.sort(ranks))
    return replace(like, units=tuple(units), ranks=tuple(taken), starts=starts)


def unit_program(found: Schedule) -> Program:
    """(1) and (2) for the units of a schedule."""
    ranks = range(found.num_ranks)
    cells = [[f"unit {j} on {r}" for r in ranks] for j in range(len(found.units))]
    every = [
        Row(f"ranks of unit {j}", dict.fromkeys(cells[j], 1.0), EQUAL, float(unit.degree))
        for j, unit in enumerate(found.units)
    ]
    busy = [
        Row(
            f"time of rank {r}",
            {cells[j][r]: unit.seconds for j, unit in enumerate(found.units)} | {"C": -1.0},
            AT_MOST,
            -found.fixed_s,
        )
        for r in ranks
    ]
    longest = max(unit.seconds for unit in found.units) + found.fixed_s
    return Program(
        name="end of the last rank",
        variables=(
            Variable("C", longest),
            *(Variable(name, 0.0, 1.0, True) for row in cells for name in row),
        ),
        rows=(*every, *busy),
        objective={"C": 1.0},
    )

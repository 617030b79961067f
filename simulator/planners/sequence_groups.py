"""Sequence-parallel groups of different sizes for sequences of different lengths (FlexSP).

A step's sequences, sorted by length, are cut into micro-batches of adjacent lengths (FlexSP's cut,
which makes the largest one smallest, and `micro_batches`' cuts by time); for each, groups g of d_g
ranks and an owner of every sequence

    min   C = max_g ( fixed + sum_(k in g) w_(k, d_g) )                                     (1)
    s.t.  sum_(k in g) s_k <= d_g rank_tokens                                               (2)
          sum_g d_g <= N                                                                    (3)
          every sequence k in one group                                                     (4)

with w and the rest from `GroupCost` (arXiv 2412.01523, equations 17 to 22). `group_bound` proves
how long C must be; at makespans a little above that it says how many groups of each size to form
and which lengths they take, `group_placement` makes a plan of it, and the best of equal groups
competes. `lower_s` holds for the micro-batches as they are cut, `cut_lower_s` for all cuts.

    Implemented in: `plan_groups` (3), `placed` (1, 2, 4), `split` (micro-batches), `plan_step`,
    `homogeneous_step` (the baseline).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InfeasibleError, InputError
from simulator.planners.group_bound import (
    Classes,
    Question,
    Whole,
    branched,
    classes,
    lower_bound_s,
    whole_groups,
)
from simulator.planners.group_placement import GroupPlan, placed
from simulator.planners.micro_batches import bounds_of, lower_step_s, places_of, time_cut
from simulator.variable_length import GroupCost, Ints

TARGETS: Final = (1.005, 1.01, 1.015, 1.02, 1.03, 1.05, 1.08)
"""Makespans over the lower bound for which whole groups are asked."""
GAP_FRAC: Final = 0.02
"""Distance from the proven bound at which the search ends."""
LIMIT_S: Final = 5.0
"""Time the search for one micro-batch may take."""
BOUND_SHARE: Final = 0.4
"""Part of that which the bound may take."""
PROGRAM_S: Final = 1.0
"""Time one program for whole groups may take."""
LEAST_S: Final = 0.05
"""Time that proving one micro-batch may take when none is left: a bound without a search."""
ROUNDING_FRAC: Final = 1e-12
SPARE_FRAC: Final = 0.005
"""Room left free when whole groups are asked for: sequences do not fill it as classes do."""
MOST_STEPS: Final = 3
"""Splits and joins between groups that are tried and the best ones."""
LEAST_STEP: Final = 1e-3
"""Distance at which the bisection of the bound ends."""
EXTRA_SPLITS: Final = 3
"""Numbers of micro-batches tried: the least one and so many more (FlexSP tries five in all)."""
TOKEN_SHARE, CUT_SHARE, CUT_BOUND_SHARE = 0.4, 0.3, 0.2
"""Parts of the time for cuts by tokens; of what is left for cuts by time; then for their bound."""
FILL_FRAC: Final = 0.9
"""Room of a group that the homogeneous baseline packs up to (FlexSP's solver)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A step: its micro-batches run one after another, each with the lengths it holds.

    `cut_lower_s`: no micro-batches of adjacent lengths take less, however cut; 0: not proven.
    """

    micro_batches: tuple[tuple[Ints, GroupPlan], ...]
    cut_lower_s: float = 0.0

    @property
    def seconds(self) -> float:
        """All micro-batches."""
        return sum(plan.seconds for _, plan in self.micro_batches)

    @property
    def lower_s(self) -> float:
        """No groups finish these micro-batches sooner; 0 where one of them has no bound."""
        lows = [plan.lower_s for _, plan in self.micro_batches]
        return sum(lows) if all(lows) else 0.0

    @property
    def gap_frac(self) -> float:
        """(plan - bound) / bound, for the micro-batches as they are cut."""
        return self.seconds / self.lower_s - 1 if self.lower_s else math.inf

    def exchange_s(self, cost: GroupCost) -> float:
        """Seconds of all-to-alls on a rank, the mean over the ranks of each micro-batch."""
        total = 0.0
        for held, plan in self.micro_batches:
            sizes = np.array(plan.degrees)[plan.owners]
            each = np.array([cost.exchange_s[d] for d in sizes.tolist()])
            total += float(np.sum(held * each * sizes)) / sum(plan.degrees)
        return total

    def __str__(self) -> str:
        return "; ".join(str(plan) for _, plan in self.micro_batches)


# ---- the groups --------------------------------------------------------------------------------


def plan_groups(
    held: Ints,
    cost: GroupCost,
    num_ranks: int,
    *,
    gap_frac: float = GAP_FRAC,
    time_limit_s: float = LIMIT_S,
    prove: bool = True,
) -> GroupPlan:
    """Groups for one micro-batch, never slower than the best of equal groups.

    The search ends when the plan is within `gap_frac` of its proven bound, or at the time limit.
    Without `prove` only the first suggestions are tried: faster, and a looser bound.
    """
    _checked(held, cost, num_ranks)
    end = time.perf_counter() + time_limit_s
    best = _best_equal(held, cost, num_ranks) or _any_groups(held, cost, num_ranks)
    if best is None:
        raise InfeasibleError(
            f"no placement of {held.sum()} tokens on {num_ranks} ranks of {cost.rank_tokens:.0f} "
            "tokens was found in one micro-batch; split it"
        )
    search = _Search(held=held, cost=cost, num_ranks=num_ranks, best=best, end=end)
    search.low = lower_bound_s(
        held, cost, num_ranks, upper_s=best.seconds, time_limit_s=BOUND_SHARE * time_limit_s
    ).seconds
    _suggest(search, gap_frac)
    if prove:
        _close(search, gap_frac)
        _wander(search, gap_frac)
    return replace(search.best, lower_s=min(search.low, search.best.seconds))


@dataclass(slots=True, kw_only=True)
class _Search:
    """The best plan and the proven bound while both are improved, until `end`."""

    held: Ints
    cost: GroupCost
    num_ranks: int
    best: GroupPlan
    end: float
    low: float = 0.0

    @property
    def left_s(self) -> float:
        """Time that is left."""
        return self.end - time.perf_counter()

    def enough_s(self, gap_frac: float) -> float:
        """Seconds of a plan that is near enough to the bound."""
        return self.low * (1 + gap_frac) * (1 + ROUNDING_FRAC)

    def try_groups(self, whole: Whole, kinds: Classes, limit_s: float, enough_s: float) -> None:
        """Place sequences in the groups, as the program deals them out, and freely."""
        degrees = _filled(whole.groups, self.cost, self.num_ranks)
        sizes_of = _sizes_of(self.held, self.cost, self.num_ranks, kinds, whole)
        for given in (sizes_of, None):
            if self.best.seconds > enough_s:
                self.try_degrees(degrees, limit_s, enough_s, given)

    def try_degrees(
        self, degrees: Sequence[int], limit_s: float, enough_s: float, sizes_of: Ints | None = None
    ) -> None:
        """Place sequences in groups; the plan stays if it is the best."""
        plan = placed(
            self.held, degrees, self.cost, sizes_of=sizes_of, limit_s=limit_s, enough_s=enough_s
        )
        if plan is not None and plan.seconds < self.best.seconds:
            self.best = plan


def _suggest(search: _Search, gap_frac: float) -> None:
    """Whole groups at makespans just above the bound, with a little room to spare."""
    kinds = classes(search.held)
    question = Question.of(kinds.means, search.cost, search.num_ranks).tighter(SPARE_FRAC)
    enough_s = search.enough_s(gap_frac)
    for target in TARGETS:
        limit_s = search.low * target
        if search.best.seconds <= max(enough_s, limit_s) or search.left_s <= 0:
            return
        whole = whole_groups(
            question, kinds.counts, search.num_ranks, limit_s,
            time_limit_s=min(search.left_s, PROGRAM_S),
        )  # fmt: skip
        if whole is not None:
            search.try_groups(whole, kinds, limit_s, enough_s)


def _close(search: _Search, gap_frac: float) -> None:
    """Raise the bound by branching on whole groups; what the branches allow is tried, too.

    First the makespan that would do, then by bisection.
    """
    kinds, high = classes(search.held), search.best.seconds
    point = max(search.best.seconds / (1 + gap_frac) * (1 + 1e-9), search.low)
    while search.best.seconds > search.enough_s(gap_frac) and search.left_s > 0:
        if high <= search.low * (1 + LEAST_STEP):
            return
        found = branched(
            search.held, search.cost, search.num_ranks, point, time_limit_s=search.left_s
        )
        if found.is_short:
            search.low = point
        else:
            high = point
            if found.whole is not None:
                search.try_groups(found.whole, kinds, point, search.enough_s(gap_frac))
        point = (search.low + min(high, search.best.seconds)) / 2


def _wander(search: _Search, gap_frac: float) -> None:
    """Neighbours of the best groups: one split in two, two joined, or both at once."""
    seen: set[tuple[int, ...]] = set()
    limits = [search.low * (1 + gap_frac * part) for part in (1.0, 0.5)]
    while search.left_s > 0 and search.best.seconds > search.enough_s(gap_frac):
        before = search.best.seconds
        for degrees in _neighbours(search.best.degrees, search.cost.degrees):
            for limit_s in limits if degrees not in seen else ():
                search.try_degrees(degrees, limit_s, search.enough_s(gap_frac))
                if search.left_s <= 0 or search.best.seconds < before * (1 - LEAST_STEP):
                    break
            seen.add(degrees)
            if search.left_s <= 0 or search.best.seconds < before * (1 - LEAST_STEP):
                break
        if search.best.seconds >= before * (1 - LEAST_STEP):
            return


def _neighbours(degrees: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Groups one step away, then those two steps away, each once."""
    start = tuple(sorted(degrees, reverse=True))
    seen, near = {start}, [start]
    for _ in range(MOST_STEPS):
        found = []
        for one in near:
            for other in _stepped(one, sizes):
                if other not in seen:
                    seen.add(other)
                    found.append(other)
                    yield other
        near = found


def _stepped(degrees: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for d in sorted(set(degrees), reverse=True):
        left = list(degrees)
        left.remove(d)
        if d % 2 == 0 and d // 2 in sizes:
            yield tuple(sorted([*left, d // 2, d // 2], reverse=True))
        if d in left and 2 * d in sizes:
            left.remove(d)
            yield tuple(sorted([*left, 2 * d], reverse=True))


def _sizes_of(
    held: Ints, cost: GroupCost, num_ranks: int, kinds: Classes, whole: Whole
) -> Ints:  # fmt: skip
    """The size that the program gives to each sequence; the longest of a class to the largest."""
    sizes = np.array([d for d in reversed(cost.degrees) if d <= num_ranks], dtype=np.int64)
    found = np.empty(len(held), dtype=np.int64)
    for kind in range(len(kinds.counts)):
        members = np.flatnonzero(kinds.of == kind)
        ends = np.round(np.cumsum(whole.assigned[::-1, kind])).astype(np.int64)
        ordered = members[np.argsort(-held[members], kind="stable")]
        places = np.searchsorted(ends, np.arange(len(members)), side="right")
        found[ordered] = sizes[np.minimum(places, len(sizes) - 1)]
    return found


def _best_equal(held: Ints, cost: GroupCost, num_ranks: int) -> GroupPlan | None:
    """The best of groups of one size; sizes that cannot be the best are not tried."""
    floors = {
        d: cost.fixed_s
        + max(float(w.max()), float(w.sum()) / (num_ranks // d))
        for d in cost.degrees
        if d <= num_ranks and held.max() <= cost.capacity_tokens(d)
        for w in [cost.weight_s(held, d)]
    }  # fmt: skip
    best: GroupPlan | None = None
    for degree in sorted(floors, key=lambda d: floors[d]):
        if best is None or floors[degree] < best.seconds:
            plan = equal_groups(held, cost, num_ranks, degree)
            best = plan if plan and (best is None or plan.seconds < best.seconds) else best
    return best


def equal_groups(held: Ints, cost: GroupCost, num_ranks: int, degree: int) -> GroupPlan | None:
    """All groups of one size; None where the sequences do not fit."""
    if degree > num_ranks or held.max() > cost.capacity_tokens(degree):
        return None
    return placed(held, [degree] * (num_ranks // degree), cost)


def _any_groups(held: Ints, cost: GroupCost, num_ranks: int) -> GroupPlan | None:
    """The best of groups that memory alone asks for: of each sequence, and of all together."""
    tried = [_counted(_sizes(held, cost, num_ranks))]
    largest = max(d for d in cost.degrees if d <= num_ranks)
    kinds = classes(held)
    question = Question.of(kinds.means, cost, num_ranks)
    for part in (1.0, 2.0, 8.0):
        seconds = cost.fixed_s + part * float(cost.weight_s(held, largest).sum())
        whole = whole_groups(question, kinds.counts, num_ranks, seconds, time_limit_s=PROGRAM_S)
        tried += [whole.groups] if whole is not None else []
    plans = [placed(held, _filled(groups, cost, num_ranks), cost) for groups in tried]
    return min((p for p in plans if p), key=lambda p: p.seconds, default=None)


def _counted(sizes: Sequence[int]) -> dict[int, int]:
    return {d: sizes.count(d) for d in sizes}


def _sizes(held: Ints, cost: GroupCost, num_ranks: int) -> list[int]:
    """The least group of each sequence, longest first, as long as ranks are left."""
    sizes: list[int] = []
    for length in sorted(held, reverse=True):
        degree = cost.least_degree(float(length))
        if sum(sizes) + degree > num_ranks:
            break
        sizes.append(degree)
    return sizes


def _filled(groups: dict[int, int], cost: GroupCost, num_ranks: int) -> list[int]:
    """The groups, and on the ranks that they leave the largest groups that fit there."""
    sizes = [d for d, n in groups.items() for _ in range(n)]
    for degree in reversed(cost.degrees):
        sizes += [degree] * ((num_ranks - sum(sizes)) // degree)
    return sorted(sizes, reverse=True)


def _checked(held: Ints, cost: GroupCost, num_ranks: int) -> None:
    if num_ranks < 1 or not len(held) or held.min() < 1:
        raise InputError("give at least one rank and sequences of at least one token")
    if cost.least_degree(float(held.max())) > num_ranks:
        raise InfeasibleError(
            f"{held.max()} tokens in one sequence need more than {num_ranks} ranks"
        )


# ---- whole steps -------------------------------------------------------------------------------


def split(held: Ints, num: int) -> list[Ints]:
    """At most `num` runs of the descending lengths, the fullest as small as it can be.

    >>> [part.tolist() for part in split(np.array([1, 5, 3, 3]), 2)]
    [[5], [3, 3, 1]]
    """
    ordered = np.sort(held)[::-1]
    ends = np.cumsum(ordered)

    def cuts(most: int) -> list[int]:
        found: list[int] = []
        done = 0
        while done < ends[-1] and len(found) <= num:
            stop = int(np.searchsorted(ends, done + most, side="right"))
            found.append(stop)
            done = int(ends[stop - 1]) if stop and ends[stop - 1] > done else int(ends[-1]) + 1
        return found if done == ends[-1] and len(found) <= num else []

    low, high = int(ordered[0]), int(ends[-1])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cuts(middle) else (middle + 1, high)
    return np.split(ordered, cuts(low)[:-1])


def bucket_error_frac(held: Ints, num: int, *, even: bool = False) -> float:
    """Tokens that rounding up to the bounds of `num` buckets adds, over the tokens there are.

    Bounds are those that add least (dynamic programming over the sorted lengths, FlexSP section
    4.1.3), or `even` parts of the longest.

    >>> bucket_error_frac(np.array([1, 2, 3, 10]), 2), bucket_error_frac(np.array([1, 3]), 1)
    (0.1875, 0.5)
    """
    ordered = np.sort(held).astype(np.float64)
    if even:
        width = ordered[-1] / num
        return float((np.ceil(ordered / width) * width).sum() / ordered.sum() - 1)
    unique, counts = np.unique(ordered, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    best = np.concatenate([[0.0], np.full(len(unique), np.inf)])
    for _ in range(min(num, len(unique))):
        after = best.copy()
        for i in range(1, len(unique) + 1):
            after[i] = np.min(best[:i] + unique[i - 1] * (ends[i] - ends[:i]))
        best = np.minimum(best, after)
    return float(best[-1] / ordered.sum() - 1)


def plan_step(
    held: Ints,
    cost: GroupCost,
    num_ranks: int,
    *,
    prove: bool = True,
    by_time: bool = True,
    extra_splits: int = EXTRA_SPLITS,
    gap_frac: float = GAP_FRAC,
    time_limit_s: float = LIMIT_S,
) -> StepPlan:
    """The best of a few numbers of micro-batches; the best homogeneous step competes.

    Cuts by tokens are tried quickly; with `by_time` those of `micro_batches` as well. With `prove`
    the best is then improved and its bounds raised, each micro-batch for its share of the time
    left.
    """
    _checked(held, cost, num_ranks)
    end = time.perf_counter() + time_limit_s
    quick = _Quick(cost, num_ranks, gap_frac)
    cuts = _token_cuts(held, quick, extra_splits, end - (1 - TOKEN_SHARE) * time_limit_s)
    if by_time and cuts and (left_s := end - time.perf_counter()) > 0:
        bounds = bounds_of(held, cost, num_ranks, places_of(cuts, len(held)))
        cuts.append(time_cut(bounds, quick.seconds, cuts, time_limit_s=CUT_SHARE * left_s))
    single = best_homogeneous(held, cost, num_ranks)
    best = min([single, *(quick.step(p) for p in cuts if p)], key=lambda step: step.seconds)
    if not prove:
        return best
    left_s = CUT_BOUND_SHARE * (end - time.perf_counter())
    if by_time and best is not single and left_s > 0:
        low = lower_step_s(held, cost, num_ranks, time_limit_s=left_s)
        best = replace(best, cut_lower_s=min(low, best.seconds))
    return _proved(best, cost, num_ranks, gap_frac, end)


def _token_cuts(held: Ints, quick: _Quick, extra: int, end: float) -> list[list[Ints]]:
    """FlexSP's cuts into the fewest micro-batches that can be planned, and a few more."""
    cuts: list[list[Ints]] = []
    least = max(math.ceil(held.sum() / (quick.num_ranks * quick.cost.rank_tokens)), 1)
    for num in range(least, len(held) + 1):
        if len(cuts) > extra or (cuts and time.perf_counter() > end):
            break
        parts = split(held, num)
        if all(math.isfinite(quick.seconds(part)) for part in parts):
            cuts.append(parts)
    return cuts


@dataclass(frozen=True)
class _Quick:
    """First plans of micro-batches, each made once."""

    cost: GroupCost
    num_ranks: int
    gap_frac: float
    plans: dict[bytes, GroupPlan | None] = field(default_factory=dict)

    def plan(self, part: Ints) -> GroupPlan | None:
        """The plan without proof; None where there is none."""
        key = part.tobytes()
        if key not in self.plans:
            try:
                self.plans[key] = plan_groups(
                    part, self.cost, self.num_ranks, gap_frac=self.gap_frac, prove=False
                )
            except InfeasibleError:
                self.plans[key] = None
        return self.plans[key]

    def seconds(self, part: Ints) -> float:
        """The plan's time; infinite where there is none."""
        plan = self.plan(part)
        return plan.seconds if plan else math.inf

    def step(self, parts: list[Ints]) -> StepPlan:
        """The plans of these micro-batches, which all have one."""
        plans = [(part, plan) for part in parts if (plan := self.plan(part))]
        return StepPlan(micro_batches=tuple(plans))


def _proved(
    step: StepPlan, cost: GroupCost, num_ranks: int, gap_frac: float, end: float
) -> StepPlan:
    """Every micro-batch that is not near its bound planned once more, as long as time is left."""
    done: list[tuple[Ints, GroupPlan]] = []
    for i, (part, plan) in enumerate(step.micro_batches):
        if plan.gap_frac > gap_frac:
            left_s = (end - time.perf_counter()) / (len(step.micro_batches) - i)
            plan = _better(part, plan, cost, num_ranks, gap_frac, max(left_s, LEAST_S))
        done.append((part, plan))
    found = replace(step, micro_batches=tuple(done))
    return replace(found, cut_lower_s=min(step.cut_lower_s, found.seconds))


def _better(
    part: Ints, plan: GroupPlan, cost: GroupCost, num_ranks: int, gap_frac: float, limit_s: float
) -> GroupPlan:
    """The faster of two plans with the higher of their bounds."""
    try:
        found = plan_groups(part, cost, num_ranks, gap_frac=gap_frac, time_limit_s=limit_s)
    except InfeasibleError:  # the heuristics found no placement, but there is this one
        low = lower_bound_s(part, cost, num_ranks, upper_s=plan.seconds, time_limit_s=limit_s)
        found = replace(plan, lower_s=low.seconds)
    faster = found if found.seconds < plan.seconds else plan
    return replace(faster, lower_s=min(max(found.lower_s, plan.lower_s), faster.seconds))


def best_homogeneous(held: Ints, cost: GroupCost, num_ranks: int) -> StepPlan:
    """The best degree for this very batch (FlexSP-BatchAda)."""
    least = cost.least_degree(float(held.max()))
    return min(
        (homogeneous_step(held, cost, num_ranks, d)
         for d in cost.degrees if least <= d <= num_ranks),
        key=lambda step: step.seconds,
    )  # fmt: skip


def homogeneous_step(held: Ints, cost: GroupCost, num_ranks: int, degree: int) -> StepPlan:
    """Equal groups throughout: sequences packed best-fit into groups up to `FILL_FRAC` of their
    room, micro-batches of as many packs as there are groups; the last one is spread evenly.
    """
    _checked(held, cost, num_ranks)
    if held.max() > cost.capacity_tokens(degree):
        raise InfeasibleError(f"{held.max()} tokens do not fit a group of {degree} ranks")
    room = max(FILL_FRAC * cost.capacity_tokens(degree), float(held.max()))
    packs, num = best_fit(held, room), num_ranks // degree
    steps = []
    for start in range(0, len(packs), num):
        here = packs[start : start + num]
        part = held[np.concatenate(here)]
        owners = np.repeat(np.arange(len(here)), [len(p) for p in here])
        whole = GroupPlan(
            degrees=(degree,) * num,
            owners=owners,
            seconds=max(cost.group_s(held[p], degree) for p in here),
        )
        even = placed(part, (degree,) * num, cost) if len(here) < num else None
        steps.append((part, even if even and even.seconds < whole.seconds else whole))
    return StepPlan(micro_batches=tuple(steps))


def best_fit(held: Iterable[int] | Ints, room: float) -> list[NDArray[np.int64]]:
    """Packs of sequence numbers, longest first, each into the fullest pack that has room.

    >>> [p.tolist() for p in best_fit([5, 4, 3, 2], 7)]
    [[0, 3], [1, 2]]
    """
    sizes = np.asarray(held)
    left = np.empty(len(sizes))
    packs: list[list[int]] = []
    for k in np.argsort(-sizes, kind="stable"):
        open_ = left[: len(packs)]
        fits = np.where(open_ >= sizes[k], open_, np.inf)
        best = int(np.argmin(fits)) if len(packs) else -1
        if best < 0 or not math.isfinite(fits[best]):
            packs.append([])
            best = len(packs) - 1
            left[best] = room
        packs[best].append(int(k))
        left[best] -= sizes[k]
    return [np.array(p, dtype=np.int64) for p in packs]

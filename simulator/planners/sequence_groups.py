"""Sequence-parallel groups of different sizes for sequences of different lengths (FlexSP).

A step's sequences, sorted by length, are cut into micro-batches of adjacent lengths (the cut that
makes the largest one smallest); for each, groups g of d_g ranks and an owner of every sequence

    min   C = max_g ( fixed + sum_(k in g) w_(k, d_g) )                                     (1)
    s.t.  sum_(k in g) s_k <= d_g rank_tokens                                               (2)
          sum_g d_g <= N                                                                    (3)
          every sequence k in one group                                                     (4)

with w and the rest from `GroupCost` (arXiv 2412.01523, equations 17 to 22). Groups of a size are
alike, so at a fixed C one asks for n_d groups of size d that take A_qd sequences of length class q:

    sum_q A_qd w_qd <= n_d (C - fixed)          sum_q A_qd s_q <= n_d d rank_tokens          (5)
    sum_d A_qd = b_q                            A_qd = 0 where one alone breaks (1) or (2)   (6)
    sum_(q: w_qd > (C - fixed) / (z + 1)) A_qd <= z n_d,   z = 1, 2, 3                       (7)
    sum_(q: s_q > d rank_tokens / (z + 1)) A_qd <= z n_d                                     (8)
    min sum_d d n_d

More than N ranks prove that C is too short: bisection gives the lower bound (classes counted at
their shortest member, no variable whole). At a C just above it, n_d whole, the groups come out;
longest-first placement with moves and swaps then gives a plan, and the homogeneous ones compete.

    Implemented in: `ranks_needed` (5 to 8), `lower_bound_s`, `placed` (1, 2, 4), `plan_groups`
    (3), `split` (micro-batches), `plan_step`, `homogeneous_step` (the baseline).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from hwmodels.errors import InfeasibleError, InputError
from simulator.variable_length import Floats, GroupCost, Ints

NUM_CLASSES: Final = 64
"""Length classes of the lower bound; fewer lengths than that are each their own."""
FEW: Final = (1, 2, 3)
"""z of (7): at most z sequences that fill more than a 1 / (z + 1) share of a group."""
BISECTIONS, FEW_BISECTIONS = 14, 6
TARGETS: Final = (1.0, 1.01, 1.03, 1.07, 1.15)
"""Makespans over the lower bound for which whole groups are asked."""
PROGRAM_LIMIT_S: Final = 2.0
"""Time one integer program may take; what it has found by then is a plan all the same."""
MOST_MOVES: Final = 400
EXTRA_SPLITS: Final = 3
"""Numbers of micro-batches tried: the least one and so many more (FlexSP tries five in all)."""
FILL_FRAC: Final = 0.9
"""Room of a group that the homogeneous baseline packs up to (FlexSP's solver)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """One micro-batch: `owners[k]` is the group of sequence k, `degrees` the groups' sizes.

    `lower_s` is proven; `gap_frac` is how far the plan may be from the best one.
    """

    degrees: tuple[int, ...]
    owners: Ints
    seconds: float
    lower_s: float = 0.0

    @property
    def gap_frac(self) -> float:
        """(plan - bound) / bound."""
        return self.seconds / self.lower_s - 1 if self.lower_s else math.inf

    def __str__(self) -> str:
        used = [self.degrees[g] for g in np.unique(self.owners)]
        counts = {d: used.count(d) for d in sorted(set(used), reverse=True)}
        return "<" + ",".join(f"{d}x{n}" if n > 1 else f"{d}" for d, n in counts.items()) + ">"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A step: its micro-batches run one after another, each with the lengths it holds."""

    micro_batches: tuple[tuple[Ints, GroupPlan], ...]

    @property
    def seconds(self) -> float:
        """All micro-batches."""
        return sum(plan.seconds for _, plan in self.micro_batches)

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


# ---- placing sequences into given groups -------------------------------------------------------


def placed(held: Ints, degrees: Sequence[int], cost: GroupCost) -> GroupPlan | None:
    """Longest first, each where it ends soonest; then moves and swaps. None where it does not fit.

    Two other rules for the first placement compete, which run out of room later.

    >>> unit = GroupCost(square_s=0, token_s=1, fixed_s=0, exchange_s={1: 0}, rank_tokens=9)
    >>> placed(np.array([3, 3, 2, 2, 2]), (1, 1), unit).seconds
    6.0
    """
    sizes = np.asarray(degrees, dtype=np.int64)
    weights = {d: cost.weight_s(held, d) for d in set(degrees)}
    table = np.stack([weights[d] for d in degrees], axis=1)
    best: _State | None = None
    for rule in (_SOONEST, _EVEN, _FULLEST):
        state = _State(
            lengths=held,
            table=table,
            room=np.asarray(sizes * cost.rank_tokens, dtype=np.float64),
            load=np.zeros(len(sizes)),
            owners=np.full(len(held), -1, dtype=np.int64),
        )
        if _filled_by(state, rule):
            _improve(state)
            best = state if best is None or state.load.max() < best.load.max() else best
    if best is None:
        return None
    return GroupPlan(
        degrees=tuple(int(d) for d in sizes),
        owners=best.owners,
        seconds=float(best.load.max()) + cost.fixed_s,
    )


_SOONEST, _EVEN, _FULLEST = "soonest", "even", "fullest"


def _filled_by(state: _State, rule: str) -> bool:
    """Longest first, each to the group of least `wanted`; False: one found no room.

    By the end of the group's time, by the larger of its shares of time and of room that are taken,
    or by the room it leaves.
    """
    whole = state.room.copy()
    even_s = state.table.mean() * len(state.lengths) / len(whole)
    for k in np.argsort(-state.lengths, kind="stable"):
        ends = state.load + state.table[k]
        wanted = {
            _SOONEST: ends,
            _EVEN: np.maximum(ends / even_s, 1 - (state.room - state.lengths[k]) / whole),
            _FULLEST: state.room,
        }[rule]
        wanted = np.where(state.room >= state.lengths[k], wanted, np.inf)
        group = int(np.argmin(wanted))
        if not math.isfinite(wanted[group]):
            return False
        state.give(int(k), group)
    return True


@dataclass(slots=True)
class _State:
    """Who has what while it changes: seconds and free tokens of every group."""

    lengths: Ints
    table: Floats
    room: Floats
    load: Floats
    owners: Ints

    def give(self, k: int, group: int) -> None:
        """Put sequence k into a group, out of the one it was in."""
        old = self.owners[k]
        if old >= 0:
            self.load[old] -= self.table[k, old]
            self.room[old] += self.lengths[k]
        self.load[group] += self.table[k, group]
        self.room[group] -= self.lengths[k]
        self.owners[k] = group


def _improve(state: _State) -> None:
    """Moves out of the fullest group, then swaps with it, as long as they shorten it."""
    for _ in range(MOST_MOVES):
        worst = int(np.argmax(state.load))
        if not (_move(state, worst) or _swap(state, worst)):
            return


def _move(state: _State, worst: int) -> bool:
    mine = np.flatnonzero(state.owners == worst)
    after = state.load[None, :] + state.table[mine]
    after[:, worst] = np.inf
    after[state.lengths[mine, None] > state.room[None, :]] = np.inf
    left = (state.load[worst] - state.table[mine, worst])[:, None]
    longest = np.maximum(after, left)
    i, group = np.unravel_index(int(np.argmin(longest)), longest.shape)
    if longest[i, group] >= state.load[worst] * (1 - 1e-9):
        return False
    state.give(int(mine[i]), int(group))
    return True


def _swap(state: _State, worst: int) -> bool:
    mine, others = np.flatnonzero(state.owners == worst), np.flatnonzero(state.owners != worst)
    if not len(others):
        return False
    theirs = state.owners[others]
    here = state.load[worst] - state.table[mine, worst][:, None] + state.table[others, worst]
    gained = state.table[mine][:, theirs] - state.table[others, theirs]
    longest = np.maximum(here, state.load[theirs] + gained)
    more = state.lengths[mine][:, None] - state.lengths[others]
    longest[(more > state.room[theirs]) | (-more > state.room[worst])] = np.inf
    i, j = np.unravel_index(int(np.argmin(longest)), longest.shape)
    if longest[i, j] >= state.load[worst] * (1 - 1e-9):
        return False
    target = int(theirs[j])
    state.give(int(mine[i]), target)
    state.give(int(others[j]), worst)
    return True


# ---- the bound and the groups ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Sequences of about the same length: `lengths` is the shortest of each, `counts` how many."""

    lengths: Ints
    counts: Ints


def classes(held: Ints, num: int = NUM_CLASSES) -> Classes:
    """At most `num` classes with about equal tokens each.

    >>> classes(np.array([4, 4, 2])).counts.tolist()
    [1, 2]
    """
    ordered = np.sort(held)
    unique, counts = np.unique(ordered, return_counts=True)
    if len(unique) <= num:
        return Classes(lengths=unique, counts=counts)
    share = np.cumsum(ordered) / ordered.sum()
    label = np.minimum((share * num).astype(np.int64), num - 1)
    starts = np.flatnonzero(np.diff(label, prepend=-1))
    return Classes(lengths=ordered[starts], counts=np.diff(starts, append=len(ordered)))


def ranks_needed(
    kinds: Classes, cost: GroupCost, num_ranks: int, seconds: float, *, whole: bool
) -> dict[int, int] | float | None:
    """Fewest ranks whose groups finish within `seconds` (5 to 8): a bound, or whole groups by size.

    None where no grouping does, or where the solver found none in `PROGRAM_LIMIT_S`.
    """
    sizes = [d for d in cost.degrees if d <= num_ranks]
    limit = seconds - cost.fixed_s
    weights = np.stack([cost.weight_s(kinds.lengths, d) for d in sizes])
    fits = (weights <= limit * (1 + 1e-12)) & (
        kinds.lengths[None, :] <= np.array([cost.capacity_tokens(d) for d in sizes])[:, None]
    )
    if limit <= 0 or not fits.any(axis=0).all():
        return None
    num, each = len(sizes), len(kinds.lengths)
    objective = np.concatenate([np.array(sizes, dtype=float), np.zeros(num * each)])
    most = np.concatenate(
        [num_ranks // np.array(sizes), (fits * kinds.counts[None, :]).ravel()]
    ).astype(float)
    from scipy.optimize import Bounds, LinearConstraint, milp  # heavy: on demand

    ranks = LinearConstraint(objective[None, :], 0, num_ranks)
    found = milp(
        objective,
        constraints=[*_rows(kinds, cost, sizes, weights, limit), *([ranks] if whole else [])],
        bounds=Bounds(0, most),
        integrality=np.concatenate([np.full(num, int(whole)), np.zeros(num * each)]),
        options={"time_limit": PROGRAM_LIMIT_S, "mip_rel_gap": 1e-3},
    )
    if found.x is None:
        return None
    if whole:
        return {d: round(found.x[i]) for i, d in enumerate(sizes) if round(found.x[i])}
    return float(found.fun)


def _rows(
    kinds: Classes, cost: GroupCost, sizes: Sequence[int], weights: Floats, limit: float
) -> list[Any]:
    """Rows (5), (7), (8) and (6); tokens are scaled by a rank's room, seconds by the limit."""
    from scipy.optimize import LinearConstraint

    num, each = len(sizes), len(kinds.lengths)
    parts: list[tuple[Floats, float]] = []
    for i, d in enumerate(sizes):
        parts += [(weights[i] / limit, 1.0), (kinds.lengths / cost.rank_tokens, float(d))]
        for z in FEW:
            long = weights[i] * (z + 1) > limit * (1 + 1e-9)
            large = kinds.lengths * (z + 1) > cost.capacity_tokens(d)
            parts += [(long.astype(float), float(z)), (large.astype(float), float(z))]
    per_size = len(parts) // num
    row, col, value = [], [], []
    for r, (used, given) in enumerate(parts):
        i = r // per_size
        cols = np.concatenate([[i], num + i * each + np.arange(each)])
        row.append(np.full(each + 1, r))
        col.append(cols)
        value.append(np.concatenate([[-given], used]))
    upper = _sparse(value, row, col, (len(parts), num * (each + 1)))
    place = np.tile(np.arange(each), num)
    every = csr_array(
        coo_array(
            (np.ones(num * each), (place, num + np.arange(num * each))),
            shape=(each, num * (each + 1)),
        )
    )
    return [
        LinearConstraint(upper, -np.inf, 0),
        LinearConstraint(every, kinds.counts, kinds.counts),
    ]


def _sparse(value: Any, row: Any, col: Any, shape: tuple[int, int]) -> Any:
    parts = (np.concatenate(x) for x in (value, row, col))
    data, rows, cols = parts
    return csr_array(coo_array((data, (rows, cols)), shape=shape))


def lower_bound_s(
    held: Ints, cost: GroupCost, num_ranks: int, *, upper_s: float, bisections: int = BISECTIONS
) -> float:
    """No grouping of these sequences on `num_ranks` ranks is faster; `upper_s` is some plan's."""
    kinds = classes(held)
    sizes = [d for d in cost.degrees if d <= num_ranks]
    fastest = np.stack([cost.weight_s(held, d) for d in sizes])
    work = np.stack([cost.weight_s(held, d) * d for d in sizes]).min(axis=0).sum()
    low = cost.fixed_s + max(float(fastest.min(axis=0).max()), float(work) / num_ranks)
    high = max(upper_s, low)
    for _ in range(bisections):
        if high - low <= 1e-4 * high:
            break
        middle = (low + high) / 2
        needed = ranks_needed(kinds, cost, num_ranks, middle, whole=False)
        if not isinstance(needed, float) or needed > num_ranks * (1 + 1e-9):
            low = middle
        else:
            high = middle
    return low


def plan_groups(held: Ints, cost: GroupCost, num_ranks: int, *, prove: bool = True) -> GroupPlan:
    """Groups for one micro-batch, never slower than the best of equal groups.

    Without `prove` fewer bisections and targets are tried: twice as fast, at times a per cent
    longer, and a looser bound.
    """
    _checked(held, cost, num_ranks)
    found = [p for p in (equal_groups(held, cost, num_ranks, d) for d in cost.degrees) if p]
    found = found or [p for p in _any_groups(held, cost, num_ranks) if p]
    if not found:
        raise InfeasibleError(
            f"no placement of {held.sum()} tokens on {num_ranks} ranks of {cost.rank_tokens:.0f} "
            "tokens was found in one micro-batch; split it"
        )
    best = min(found, key=lambda p: p.seconds)
    tries = BISECTIONS if prove else FEW_BISECTIONS
    low = lower_bound_s(held, cost, num_ranks, upper_s=best.seconds, bisections=tries)
    kinds = classes(held)
    for target in TARGETS if prove else TARGETS[1:4]:
        if low * target >= best.seconds:
            break
        groups = ranks_needed(kinds, cost, num_ranks, low * target, whole=True)
        if isinstance(groups, dict):
            plan = placed(held, _filled(groups, cost, num_ranks), cost)
            best = plan if plan and plan.seconds < best.seconds else best
    return GroupPlan(degrees=best.degrees, owners=best.owners, seconds=best.seconds, lower_s=low)


def equal_groups(held: Ints, cost: GroupCost, num_ranks: int, degree: int) -> GroupPlan | None:
    """All groups of one size; None where the sequences do not fit."""
    if degree > num_ranks or held.max() > cost.capacity_tokens(degree):
        return None
    return placed(held, [degree] * (num_ranks // degree), cost)


def _any_groups(held: Ints, cost: GroupCost, num_ranks: int) -> Iterable[GroupPlan | None]:
    """Groups that memory alone asks for: of each sequence for itself, and of all together."""
    yield placed(held, _filled(_counted(_sizes(held, cost, num_ranks)), cost, num_ranks), cost)
    largest = max(d for d in cost.degrees if d <= num_ranks)
    for part in (1.0, 2.0, 8.0):
        seconds = cost.fixed_s + part * float(cost.weight_s(held, largest).sum())
        groups = ranks_needed(classes(held), cost, num_ranks, seconds, whole=True)
        if isinstance(groups, dict):
            yield placed(held, _filled(groups, cost, num_ranks), cost)


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
    extra_splits: int = EXTRA_SPLITS,
) -> StepPlan:
    """The best of a few numbers of micro-batches; the best homogeneous step competes."""
    _checked(held, cost, num_ranks)
    room = num_ranks * cost.rank_tokens
    least = max(math.ceil(held.sum() / room), 1)
    best: StepPlan | None = None
    tried, num = 0, least
    while tried <= extra_splits and num <= len(held):
        try:
            parts = split(held, num)
            plans = [(part, plan_groups(part, cost, num_ranks, prove=prove)) for part in parts]
            found = StepPlan(micro_batches=tuple(plans))
            best = found if best is None or found.seconds < best.seconds else best
            tried += 1
        except InfeasibleError:
            pass
        num += 1
    homogeneous = best_homogeneous(held, cost, num_ranks)
    if best is None or homogeneous.seconds < best.seconds:
        return homogeneous
    return best


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

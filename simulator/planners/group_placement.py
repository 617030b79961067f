"""Sequences into given groups: a first placement, then moves and swaps that shorten the slowest.

Of groups g with d_g ranks the slowest ends last, and none holds more than its room:

    min max_g ( fixed + sum_(k in g) w_(k, d_g) ),     sum_(k in g) s_k <= d_g rank_tokens   (1)

Longest first, each sequence goes where a rule says; a plan of which size of group each
sequence goes to (from the program of `group_bound`) may narrow the choice. Then
sequences of the slowest group move out of it or swap with others as long as that shortens it.

Implemented in: `placed` (1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from simulator.variable_length import Floats, GroupCost, Ints

Bools = NDArray[np.bool_]

MOST_MOVES: Final = 400
LEAST_GAIN: Final = 1e-9
"""Share by which a move must shorten the slowest group."""


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


def placed(
    held: Ints,
    degrees: Sequence[int],
    cost: GroupCost,
    *,
    sizes_of: Ints | None = None,
    limit_s: float = 0.0,
    enough_s: float = 0.0,
) -> GroupPlan | None:
    """Longest first, each where it ends soonest; then moves and swaps. None where it does not fit.

    `sizes_of[k]`: the size of the group that sequence k first goes to; `limit_s`: makespan to which
    time and room are filled evenly first (0: by time, and by room where that finds none). At
    `enough_s` it ends.

    >>> unit = GroupCost(square_s=0, token_s=1, fixed_s=0, exchange_s={1: 0}, rank_tokens=9)
    >>> placed(np.array([3, 3, 2, 2, 2]), (1, 1), unit).seconds
    6.0
    """
    sizes = np.asarray(degrees, dtype=np.int64)
    weights = {d: cost.weight_s(held, d) for d in set(degrees)}
    table = np.stack([weights[d] for d in degrees], axis=1)
    shares = held[:, None] / (sizes * cost.rank_tokens)[None, :]
    allowed = None if sizes_of is None else sizes_of[:, None] == sizes[None, :]
    even_s = limit_s - cost.fixed_s if limit_s else float(table.mean() * len(held) / len(sizes))
    for rule in (EVEN,) if limit_s else RULES:
        state = _State.empty(table / even_s, shares)
        if not _filled_by(state, rule, allowed):
            continue
        enough = (enough_s - cost.fixed_s) / even_s
        if state.used[1].max() > FULL:
            _improve(state, _larger, 1.0)
        if state.used[1].max() <= FULL:
            _improve(state, _time, enough)
            return _plan(held, sizes, cost, state.owners)
    return None


def _plan(held: Ints, sizes: Ints, cost: GroupCost, owners: Ints) -> GroupPlan:
    """The plan with its seconds summed anew."""
    seconds = max(
        cost.group_s(held[owners == g], d)
        for g, d in enumerate(sizes.tolist())
        if (owners == g).any()
    )
    return GroupPlan(
        degrees=tuple(sizes.tolist()), owners=owners, seconds=seconds,
    )  # fmt: skip


SOONEST, EVEN, FULLEST = "soonest", "even", "fullest"
RULES: Final = (SOONEST, EVEN, FULLEST)
FULL: Final = 1 + 1e-12
"""Share of a group's room that counts as full: rounding of a sum of shares."""


@dataclass(slots=True)
class _State:
    """Who has what while it changes: `used[:, g]` shares of time and of room of every group.

    `parts[:, k, g]` is what sequence k takes there.
    """

    parts: Floats
    used: Floats
    owners: Ints

    @staticmethod
    def empty(times: Floats, rooms: Floats) -> _State:
        """Nothing placed yet."""
        num, groups = times.shape
        return _State(
            parts=np.stack([times, rooms]), used=np.zeros((2, groups)),
            owners=np.full(num, -1, dtype=np.int64),
        )  # fmt: skip

    def give(self, k: int, group: int) -> None:
        """Put sequence k into a group, out of the one it was in."""
        old = self.owners[k]
        if old >= 0:
            self.used[:, old] -= self.parts[:, k, old]
        self.used[:, group] += self.parts[:, k, group]
        self.owners[k] = group


def _time(used: Floats) -> Floats:
    """Share of time; infinite beyond the room."""
    return np.where(used[1] <= FULL, used[0], np.inf)


def _larger(used: Floats) -> Floats:
    """The larger of both shares."""
    larger: Floats = np.maximum(used[0], used[1])
    return larger


def _filled_by(state: _State, rule: str, allowed: Bools | None) -> bool:
    """Longest first, each to the group of least score afterwards; False: one found no room.

    By time, by the larger of both shares (rooms may overflow: moves mend that), or by the room
    that is left.
    """
    for k in np.argsort(-state.parts[1, :, 0], kind="stable").tolist():
        after = state.used + state.parts[:, k]
        score = _larger(after) if rule == EVEN else _time(after)
        if rule == FULLEST:
            score = np.where(score < np.inf, -state.used[1], np.inf)
        if allowed is not None and allowed[k].any():
            score = np.where(allowed[k], score, np.inf)
        group = int(score.argmin())
        if not score[group] < np.inf:
            return False
        state.give(k, group)
    return True


Score = Callable[[Floats], Floats]


def _improve(state: _State, score: Score, enough: float) -> None:
    """Moves out of the fullest group, then swaps with it, as long as they shorten it."""
    for _ in range(MOST_MOVES):
        scores = score(state.used)
        worst = int(np.argmax(scores))
        if scores[worst] <= enough:
            return
        best = scores[worst] * (1 - LEAST_GAIN)
        if not any(step(state, score, worst, best) for step in (_move, _swap, _trade)):
            return


def _move(state: _State, score: Score, worst: int, best: float) -> bool:
    mine = np.flatnonzero(state.owners == worst)
    after = score(state.used[:, None, :] + state.parts[:, mine])
    after[:, worst] = np.inf
    left = score(state.used[:, worst, None] - state.parts[:, mine, worst])
    longest = np.maximum(after, left[:, None])
    i, group = np.unravel_index(int(np.argmin(longest)), longest.shape)
    if longest[i, group] >= best:
        return False
    state.give(int(mine[i]), int(group))
    return True


def _swap(state: _State, score: Score, worst: int, best: float) -> bool:
    mine, others = np.flatnonzero(state.owners == worst), np.flatnonzero(state.owners != worst)
    if not len(others):
        return False
    theirs = state.owners[others]
    out = state.used[:, worst, None] - state.parts[:, mine, worst]
    here = score(out[:, :, None] + state.parts[:, others, worst][:, None, :])
    left = state.used[:, theirs] - state.parts[:, others, theirs]
    there = score(left[:, None, :] + state.parts[:, mine][:, :, theirs])
    longest = np.maximum(here, there)
    i, j = np.unravel_index(int(np.argmin(longest)), longest.shape)
    if longest[i, j] >= best:
        return False
    target = int(theirs[j])
    state.give(int(mine[i]), target)
    state.give(int(others[j]), worst)
    return True


def _trade(state: _State, score: Score, worst: int, best: float) -> bool:
    """One long sequence for several shorter ones of about as many tokens: they take less time.

    Those are a run of another group's sequences by length, just long enough to make room.
    """
    mine = np.flatnonzero(state.owners == worst)
    mine = mine[np.argsort(-state.parts[1, mine, worst])][:MOST_TRADED]
    out = state.used[:, worst, None] - state.parts[:, mine, worst]
    found: tuple[float, int, int, Ints] | None = None
    for group in np.argsort(score(state.used), kind="stable")[:MOST_TRADED].tolist():
        theirs = np.flatnonzero(state.owners == group)
        if group == worst or not len(theirs):
            continue
        theirs = theirs[np.argsort(state.parts[1, theirs, group], kind="stable")]
        there, here = (_sums(state.parts[:, theirs, g]) for g in (group, worst))
        into = state.used[:, group, None] + state.parts[:, mine, group]
        need = np.maximum(into[1] - 1.0, 0.0)
        ends = np.searchsorted(there[1], there[1][None, :-1] + need[:, None])
        starts, last = np.arange(len(theirs))[None, :], np.minimum(ends, len(theirs))
        mended = score(into[:, :, None] - (there[:, last] - there[:, starts]))
        worsened = score(out[:, :, None] + here[:, last] - here[:, starts])
        longest = np.maximum(mended, worsened)
        i, start = np.unravel_index(int(np.argmin(longest)), longest.shape)
        if longest[i, start] < (best if found is None else found[0]):
            taken = theirs[int(start) : int(last[i, start])]
            found = (float(longest[i, start]), int(mine[i]), group, taken)
    if found is None:
        return False
    _, k, group, taken = found
    state.give(k, group)
    for other in taken.tolist():
        state.give(other, worst)
    return True


def _sums(parts: Floats) -> Floats:
    """Running sums along the last axis, from zero on."""
    return np.concatenate([np.zeros((2, 1)), np.cumsum(parts, axis=1)], axis=1)


MOST_TRADED: Final = 12
"""Sequences of the slowest group, and groups, among which trades are looked for."""

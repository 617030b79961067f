"""Prompts packed into rows of one length: Prepacking's bin packing, proved.

A batch of n prompts padded to the longest takes n len_max tokens. Packed, several prompts share a
row of `room` tokens (the longest prompt's, unless given), each with its own causal block of the
mask and positions that start again; k rows padded to the fullest take k len_row tokens:

    min   k = sum_p x_p                                                                      (1)
    s.t.  sum_p count_pj x_p >= b_j      every one of the b_j prompts of length s_j          (2)
          x_p whole, patterns p with sum_j count_pj s_j <= room                              (3)

`constant volume` is what the paper runs: longest first, each into the fullest row that has room
(best-fit decreasing, `binpacking.to_constant_volume`); `fullest rows` looks a row at a time for the
prompts that fill it most. What no packing beats:

    L1 = ceil(sum s / room)
    L2 = max_K  |s > room - K| + |room - K >= s > room / 2|
                + max(0, ceil((sum_(room/2 >= s >= K) s - free_K) / room))                    (4)
    pattern bound  ceil( sum_j b_j y_j / max_p sum_j count_pj y_j )   for any prices y >= 0   (5)

free_K is what the rows of the middle set leave. (4) holds for every K up to room / 2. In (5) the
best pattern is found by dynamic programming over the room, so that the bound stands on arithmetic,
not on how the solver of the relaxed (1) to (3) ended; patterns that price above 1 join the program
(column generation). Whole x over the patterns found give rows; where these and the bound differ,
the paper's assignment program at one row less decides as far as time allows:

    sum_r x_jr = b_j,   sum_j s_j x_jr <= room                                                (6)

Source: Zhao et al. 2024, Prepacking (arXiv 2404.09529), and siyan-zhao/prepacking, utils.py; (4)
Martello and Toth 1990, Knapsack Problems, section 8.3; (5) Gilmore and Gomory 1961 and Farley 1990.
Implemented in: `constant_volume`, `lower_rows` (4), `_priced` (5), `pattern_program` (1 to 3),
`row_program` (6), `pack`.

Ignored: the tokens that a packed row drops (each prompt's last, which generation reads again).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hwmodels.errors import InfeasibleError, InputError
from simulator.planners.program import (
    AT_LEAST,
    AT_MOST,
    EQUAL,
    FEASIBLE,
    INFEASIBLE,
    OPTIMAL,
    Program,
    Row,
    Solution,
    Variable,
    solve,
)
from simulator.planners.sequence_groups import best_fit
from simulator.variable_length import Floats, Ints

LIMIT_S: Final = 5.0
"""Time that proving may take."""
MOST_STEPS: Final = 40_000_000
"""Items times room that a pattern's dynamic program may have; beyond it (4) is the bound."""
MOST_CHOICES: Final = 5_000
"""Whole variables up to which (6) is asked."""
MOST_ROUNDS: Final = 400
SAFE_FRAC: Final = 1e-9
"""Rounding of (5), on the safe side."""
CONSTANT_VOLUME, FULLEST, PATTERNS, ASSIGNMENT = (
    "constant volume", "fullest rows", "patterns", "assignment",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """`row_of[k]` is the row of prompt k; no packing has fewer than `lower_rows` rows.

    `patterns` (rows of counts by distinct length, `lengths`) are those the proof went through.
    """

    held: Ints
    room: int
    row_of: Ints
    lower_rows: int
    method: str
    solve_s: float
    lengths: Ints
    counts: Ints
    patterns: Ints

    @property
    def num_rows(self) -> int:
        """Rows of the packed batch."""
        return int(self.row_of.max()) + 1

    @property
    def status(self) -> str:
        """'optimal' where no packing has fewer rows, else 'feasible'."""
        return OPTIMAL if self.num_rows == self.lower_rows else FEASIBLE

    @property
    def gap_frac(self) -> float:
        """(rows - bound) / rows."""
        return 1 - self.lower_rows / self.num_rows

    @property
    def row_tokens(self) -> Ints:
        """Tokens of each row before it is padded."""
        return np.bincount(self.row_of, weights=self.held).astype(np.int64)

    @property
    def len_row(self) -> int:
        """Tokens of a row: the fullest one's."""
        return int(self.row_tokens.max())

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.num_rows * self.len_row

    @property
    def padding_frac(self) -> float:
        """Share of these that is padding."""
        return 1 - float(self.held.sum()) / self.num_tokens

    @property
    def saved_frac(self) -> float:
        """Tokens saved of those that padding every prompt to the longest would take."""
        return 1 - self.num_tokens / (len(self.held) * float(self.held.max()))

    def members(self) -> list[Ints]:
        """Prompts of each row."""
        return [np.flatnonzero(self.row_of == row) for row in range(self.num_rows)]


def pack(
    held: Ints,
    room: int | None = None,
    *,
    prove: bool = True,
    time_limit_s: float = LIMIT_S,
    gap_frac: float = 0.0,
) -> Packing:
    """Rows for prompts of these lengths; without `prove` the paper's heuristic and the bound (4).

    >>> found = pack(np.array([6, 5, 4, 3, 2]), 10)
    >>> found.num_rows, found.lower_rows, found.row_of.tolist()
    (2, 2, [0, 1, 0, 1, 1])
    """
    begin = time.perf_counter()
    room = _checked(held, room)
    lengths, counts = np.unique(held, return_counts=True)
    found = Packing(
        held=held, room=room, row_of=constant_volume(held, room), lower_rows=lower_rows(held, room),
        method=CONSTANT_VOLUME, solve_s=0.0, lengths=lengths, counts=counts,
        patterns=np.zeros((0, len(lengths)), dtype=np.int64),
    )  # fmt: skip
    if prove and found.gap_frac > gap_frac:
        found = _fewer(found, fullest_rows(held, room), FULLEST)
    if prove and found.gap_frac > gap_frac:
        found = _proved(found, begin + time_limit_s, gap_frac)
    return replace(found, solve_s=time.perf_counter() - begin)


def _checked(held: Ints, room: int | None) -> int:
    if not len(held) or held.min() < 1:
        raise InputError("give prompts of at least one token")
    longest = int(np.argmax(held))
    if room is not None and held[longest] > room:
        raise InfeasibleError(
            f"prompt {longest + 1} of {held[longest]} tokens fits no row of {room}; give rows of "
            f"{held[longest]} tokens or leave it out"
        )
    return int(room or held[longest])


def constant_volume(held: Ints, room: int) -> Ints:
    """The paper's rows: longest first, each into the fullest that has room.

    >>> constant_volume(np.array([2, 7, 5, 3]), 10).tolist()
    [1, 0, 1, 0]
    """
    row_of = np.empty(len(held), dtype=np.int64)
    for row, members in enumerate(best_fit(held, room)):
        row_of[members] = row
    return row_of


def fullest_rows(held: Ints, room: int) -> Ints:
    """Rows one by one: the longest prompt left, and those of the others that fill its row most.

    What fills it is a sum of subsets, kept as the bits of a number (Gupta and Ho 1999, minimum bin
    slack, with the longest prompt first); among equals longer prompts go first.

    >>> fullest_rows(np.array([6, 5, 4, 3, 2]), 10).tolist()
    [0, 1, 0, 1, 1]
    """
    left = np.argsort(-held, kind="stable").tolist()
    row_of = np.empty(len(held), dtype=np.int64)
    row = 0
    while left:
        first, *others = left
        free = room - int(held[first])
        mask, sums = (1 << (free + 1)) - 1, [1]
        for k in others:
            sums.append((sums[-1] | (sums[-1] << int(held[k]))) & mask)
        at, taken = sums[-1].bit_length() - 1, {first}
        for i in range(len(others) - 1, -1, -1):
            if not sums[i] >> at & 1:
                taken.add(others[i])
                at -= int(held[others[i]])
        row_of[list(taken)] = row
        left = [k for k in others if k not in taken]
        row += 1
    return row_of


def lower_rows(held: Ints, room: int) -> int:
    """(4), the best K of the lengths that there are; L1 is K = 0 without large prompts.

    >>> lower_rows(np.array([6, 6, 6]), 10), lower_rows(np.array([5, 5, 5]), 10)
    (3, 2)
    """
    ordered = np.sort(held)
    ends = np.concatenate([[0], np.cumsum(ordered)])
    small = ordered[2 * ordered <= room]
    half = len(small)
    cuts = np.unique(np.concatenate([[0], small]))
    over = np.searchsorted(ordered, room - cuts, side="right")  # from here on alone with any of K
    start = np.searchsorted(ordered, cuts, side="left")
    middle = over - half
    free = middle * room - (ends[over] - ends[half])
    rest = np.maximum(ends[half] - ends[start] - free, 0)
    return int((len(ordered) - half + -(-rest // room)).max())


def _fewer(found: Packing, row_of: Ints, method: str) -> Packing:
    """The packing with these rows, if they are fewer."""
    tried = replace(found, row_of=row_of, method=method)
    return tried if tried.num_rows < found.num_rows else found


# ---- proof -------------------------------------------------------------------------------------


def _proved(found: Packing, end: float, gap_frac: float) -> Packing:
    """A higher bound and fewer rows, until they meet or time is up."""
    caps = np.minimum(found.counts, found.room // found.lengths)
    digits = np.array([len(_digits(int(cap))) for cap in caps])
    unit = int(np.gcd.reduce([*found.lengths.tolist(), found.room]))
    if int(digits.sum()) * (found.room // unit) <= MOST_STEPS:
        found = _generated(found, caps, unit, end, gap_frac)
        found = _rounded(found, end, gap_frac)
    while found.gap_frac > gap_frac and end > time.perf_counter():
        program = row_program(found, found.num_rows - 1)
        if len(program.variables) > MOST_CHOICES:
            break
        answer = solve(program, time_limit_s=end - time.perf_counter(), explain=False)
        if answer.status == INFEASIBLE:
            return replace(found, lower_rows=found.num_rows)
        if not answer.has_point:
            break
        found = replace(found, row_of=_from_rows(found, answer), method=ASSIGNMENT)
    return found


def _generated(found: Packing, caps: Ints, unit: int, end: float, gap_frac: float) -> Packing:
    """Patterns, until none prices above 1, with the best bound (5) on the way."""
    patterns = _patterns_of(found, found.row_of)
    found = replace(found, patterns=np.unique(np.vstack([patterns, np.diag(caps)]), axis=0))
    for _ in range(MOST_ROUNDS):
        left_s = end - time.perf_counter()
        if left_s <= 0 or found.gap_frac <= gap_frac:
            break
        answer = solve(pattern_program(found, whole=False), time_limit_s=left_s, explain=False)
        if answer.duals is None:
            break
        prices = np.maximum([answer.duals[_name(s)] for s in found.lengths.tolist()], 0.0)
        worth, pattern = _priced(prices, found.lengths // unit, caps, found.room // unit)
        low = float(prices @ found.counts) / max(worth, 1.0) * (1 - SAFE_FRAC)
        found = replace(found, lower_rows=max(found.lower_rows, math.ceil(low - SAFE_FRAC)))
        if worth <= 1 + SAFE_FRAC:
            break
        found = replace(found, patterns=np.vstack([found.patterns, pattern]))
    return found


def _priced(prices: Floats, sizes: Ints, caps: Ints, room: int) -> tuple[float, Ints]:
    """The pattern of the highest price, and that price: a bounded knapsack.

    Counts are made of powers of two, so that each is taken once.
    """
    items = [(j, n) for j, cap in enumerate(caps.tolist()) for n in _digits(cap)]
    best = np.zeros(room + 1)
    taken = np.zeros((len(items), room + 1), dtype=bool)
    for i, (j, n) in enumerate(items):
        size = int(sizes[j]) * n
        tried = best[: room + 1 - size] + prices[j] * n
        better = tried > best[size:]
        taken[i, size:] = better
        best[size:] = np.where(better, tried, best[size:])
    at, pattern = room, np.zeros(len(sizes), dtype=np.int64)
    for i in range(len(items) - 1, -1, -1):
        if taken[i, at]:
            j, n = items[i]
            pattern[j] += n
            at -= int(sizes[j]) * n
    return float(best[room]), pattern


def _digits(cap: int) -> list[int]:
    """Parts whose sums are all the counts up to `cap`.

    >>> _digits(10)
    [1, 2, 4, 3]
    """
    found, power = [], 1
    while cap > 0:
        found.append(min(power, cap))
        cap -= found[-1]
        power *= 2
    return found


def _rounded(found: Packing, end: float, gap_frac: float) -> Packing:
    """Whole numbers of the patterns that were found."""
    left_s = end - time.perf_counter()
    if found.gap_frac <= gap_frac or left_s <= 0:
        return found
    answer = solve(pattern_program(found), time_limit_s=left_s / 2, explain=False)
    if not answer.has_point:
        return found
    times = [round(answer.values[_pattern_name(p)]) for p in range(len(found.patterns))]
    return _fewer(found, _from_patterns(found, times), PATTERNS)


def _from_patterns(found: Packing, times: list[int]) -> Ints:
    """Prompts dealt to the patterns; what a pattern has too many of stays out."""
    rows = [pattern for p, n in enumerate(times) for pattern in [found.patterns[p]] * n]
    return _dealt(found, np.array(rows))


def _from_rows(found: Packing, answer: Solution) -> Ints:
    num = found.num_rows - 1
    rows = [[round(answer.values[f"{_name(s)} in row {r}"]) for s in found.lengths.tolist()]
            for r in range(num)]  # fmt: skip
    return _dealt(found, np.array(rows))


def _dealt(found: Packing, rows: Ints) -> Ints:
    """Row of every prompt where row r has room for rows[r, j] prompts of length j."""
    row_of = np.empty(len(found.held), dtype=np.int64)
    for j, length in enumerate(found.lengths.tolist()):
        members = np.flatnonzero(found.held == length)
        row_of[members] = np.repeat(np.arange(len(rows)), rows[:, j])[: len(members)]
    _, row_of = np.unique(row_of, return_inverse=True)
    return row_of


def _patterns_of(found: Packing, row_of: Ints) -> Ints:
    """The rows of a packing as patterns."""
    place = np.searchsorted(found.lengths, found.held)
    patterns = np.zeros((int(row_of.max()) + 1, len(found.lengths)), dtype=np.int64)
    np.add.at(patterns, (row_of, place), 1)
    return patterns


# ---- programs ----------------------------------------------------------------------------------


def _name(length: int) -> str:
    return f"prompts of {length}"


def _pattern_name(place: int) -> str:
    return f"rows of pattern {place}"


def pattern_program(found: Packing, *, whole: bool = True) -> Program:
    """(1) to (3) over the patterns of a packing, or over its own rows where it has no others."""
    patterns = found.patterns if len(found.patterns) else _patterns_of(found, found.row_of)
    names = [_pattern_name(p) for p in range(len(patterns))]
    return Program(
        name="rows of packed prompts",
        variables=tuple(Variable(name, 0.0, float(len(found.held)), whole) for name in names),
        rows=tuple(
            Row(
                _name(length),
                {names[p]: float(patterns[p, j]) for p in np.flatnonzero(patterns[:, j])},
                AT_LEAST,
                float(found.counts[j]),
            )
            for j, length in enumerate(found.lengths.tolist())
        ),
        objective=dict.fromkeys(names, 1.0),
    )


def row_program(found: Packing, num_rows: int) -> Program:
    """(6): can the prompts be had in so many rows? Rows are in the order of their tokens."""
    lengths, rows = found.lengths.tolist(), range(num_rows)
    cells = {(s, r): f"{_name(s)} in row {r}" for s in lengths for r in rows}
    tokens = [{cells[s, r]: float(s) for s in lengths} for r in rows]
    every = [
        Row(_name(s), {cells[s, r]: 1.0 for r in rows}, EQUAL, float(n))
        for s, n in zip(lengths, found.counts.tolist(), strict=True)
    ]
    fits = [Row(f"room of row {r}", tokens[r], AT_MOST, float(found.room)) for r in rows]
    order = [
        Row(f"row {r} after row {r - 1}", tokens[r] | {k: -v for k, v in tokens[r - 1].items()},
            AT_MOST, 0.0)
        for r in rows[1:]
    ]  # fmt: skip
    return Program(
        name=f"prompts in {num_rows} rows",
        variables=tuple(
            Variable(cells[s, r], 0.0, float(min(n, found.room // s)), True)
            for s, n in zip(lengths, found.counts.tolist(), strict=True)
            for r in rows
        ),
        rows=(*every, *fits, *order),
        objective={},
    )

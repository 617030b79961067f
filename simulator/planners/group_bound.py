"""What no grouping of sequences beats: a linear program over classes, its prices as the proof.

At a fixed makespan C a group of d ranks has L = C - fixed seconds and d rank_tokens tokens of room.
One asks for n_d groups of size d that take A_qd sequences of length class q (w_qd seconds there):

    min sum_d d n_d                                                                          (1)
    sum_q A_qd w_qd <= n_d L              sum_q A_qd s_q <= n_d d rank_tokens                (2)
    sum_q A_qd above(w_qd / L, z) <= z n_d       above(x, z) = ceil((z + 1) x) - 1           (3)
    sum_q A_qd above(s_q / (d rank_tokens), z) <= z n_d,     z of `CUTS`                     (4)
    sum_d A_qd = b_q                      A_qd = 0 where one alone breaks (2)                (5)

(3) and (4) hold for whole sequences: shares that add up to 1 have parts above(x, z) < (z + 1) x
that add up to less than z + 1. A group of which one sequence takes more than half the time has room
only for what fits into the rest of it, so in the rows of room that sequence counts as

    share'_k = max( share_k, 1 - (1 - w_k / L) max_j (room share_j / time share_j) )         (8)

which no group exceeds either, as it holds one such sequence at most. The prices of (2) to (4) give
every sequence a worth in a group of size d, scaled so that no group of that size can hold more than
d:

    worth_d(s) = sum over rows of price * part,    scaled by d / sum over rows of price * z     (6)
    sum_k min_d worth_d(s_k) > N ranks   proves that no grouping ends within C               (7)

(7) holds for any prices at all, so it is checked here in plain arithmetic and over the sequences
themselves: nothing rests on how the solver of (1) ended, nor on the classes. The same prices, with
the parts of a longer C, often prove that C too; from the longest that they prove the next program
starts (Newton's method), until its prices prove nothing more.

Source: groups at a fixed makespan as in FlexSP (arXiv 2412.01523, equations 17 to 22); (3), (4) and
(6) as dual feasible functions (Fekete and Schepers 2001, u^(k)).
Implemented in: `relaxed` (1 to 5), `_lifted` (8), `needed_ranks` (6, 7), `lower_bound_s`;
`branched` with whole n_d (9).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from simulator.variable_length import Floats, GroupCost, Ints

NUM_CLASSES: Final = 64
"""Length classes of the program; fewer lengths than that are each their own."""
CUTS: Final = (1, 2, 3, 5)
"""z of (3) and (4)."""
MOST_ROUNDS: Final = 12
"""Programs solved for one bound; two to five are usual."""
RISE_FRAC: Final = 1e-4
"""Rise of the bound under which the search for a better one ends."""
SAFE_FRAC: Final = 1e-9
"""Rounding of the sums in (7), on the safe side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Sequences of about the same length: `lengths` is the shortest of each, `counts` how many.

    `of[k]` is the class of sequence k, `means` their mean length.
    """

    lengths: Ints
    counts: Ints
    means: Floats
    of: Ints


def classes(held: Ints, num: int = NUM_CLASSES) -> Classes:
    """At most `num` classes with about equal tokens each.

    >>> classes(np.array([4, 4, 2])).counts.tolist()
    [1, 2]
    """
    unique, label, counts = np.unique(held, return_inverse=True, return_counts=True)
    if len(unique) > num:
        share = np.cumsum(unique * counts) / held.sum()
        rank = np.minimum((share * num).astype(np.int64), num - 1)
        starts = np.flatnonzero(np.diff(rank, prepend=-1))
        label = (np.searchsorted(starts, np.arange(len(unique)), side="right") - 1)[label]
        unique = unique[starts]
        counts = np.bincount(label, minlength=len(starts))
    means = np.bincount(label, weights=held) / counts
    return Classes(lengths=unique, counts=counts, means=means, of=label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Lengths on ranks; `weights[d, k]` seconds and `room_fracs[d, k]` share of a group's room."""

    lengths: Ints | Floats
    sizes: Ints
    fixed_s: float
    weights: Floats
    room_fracs: Floats

    @staticmethod
    def of(lengths: Ints | Floats, cost: GroupCost, num_ranks: int) -> Question:
        """The question for these lengths (of sequences, or of classes)."""
        sizes = [d for d in cost.degrees if d <= num_ranks]
        return Question(
            lengths=lengths,
            sizes=np.array(sizes, dtype=np.int64),
            fixed_s=cost.fixed_s,
            weights=np.stack([cost.weight_s(lengths, d) for d in sizes]),
            room_fracs=np.stack([lengths / cost.capacity_tokens(d) for d in sizes]),
        )

    def tighter(self, spare_frac: float) -> Question:
        """The same with less room."""
        return replace(self, room_fracs=self.room_fracs * (1 + spare_frac))

    def parts(self, seconds: float) -> tuple[Floats, NDArray[np.bool_]]:
        """Left sides of rows (2) to (4) over their right sides' `Z`, [row, size, length]; who fits.

        Rounding is on the safe side: a share that is a whole multiple does not count as above it.
        """
        shares = np.stack([self.weights / (seconds - self.fixed_s), self.room_fracs])
        fits = np.asarray((shares <= 1 + SAFE_FRAC).all(axis=0))
        shares[1] = _lifted(shares[0], shares[1])
        above = [
            np.ceil((z + 1) * shares[:, :, :] * (1 - SAFE_FRAC)) - 1 for z in CUTS
        ]  # fmt: skip
        return np.concatenate([shares, *above]), fits


def _lifted(times: Floats, rooms: Floats) -> Floats:
    """(8): the room that a sequence of more than half a group's time keeps from others."""
    rates = np.divide(rooms, times, out=np.full(times.shape, np.inf), where=times > 0)
    most = rates.max(axis=1, keepdims=True)
    left = np.maximum(1 - times, 0.0) + SAFE_FRAC
    kept = np.maximum(rooms, 1 - most * left)
    return np.where(times > 0.5 * (1 + SAFE_FRAC), np.minimum(kept, np.maximum(rooms, 1.0)), rooms)


Z: Final = np.array([1, 1, *(z for z in CUTS for _ in range(2))], dtype=np.float64)
"""Right sides of rows (2) to (4) for one group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """Groups by size and their sequences by class, none whole; `prices[row, size]` of the rows."""

    num_groups: Floats
    assigned: Floats
    prices: Floats


@dataclass(frozen=True, slots=True)
class _Fixed:
    """The program at one makespan; numbers of groups within a box are all that changes."""

    question: Question
    fits: NDArray[np.bool_]
    upper: Any
    equal: Any
    costs: Floats
    columns: tuple[Ints, Ints]
    counts: Ints
    excess: float

    @staticmethod
    def of(question: Question, counts: Ints, num_ranks: int, seconds: float) -> _Fixed | None:
        """None where a sequence fits no group.

        Groups beyond the box cost `excess` times their ranks, so that every box has a solution and
        with it prices.
        """
        from scipy.sparse import hstack

        parts, fits = question.parts(seconds)
        if not fits.any(axis=0).all():
            return None
        upper, equal, costs, columns = matrices(question, parts, fits)
        num, excess = len(question.sizes), 1.0 + num_ranks
        return _Fixed(
            question, fits, hstack([upper, upper[:, :num]], format="csr"),
            hstack([equal, equal[:, :num]], format="csr"),
            np.concatenate([costs, excess * question.sizes]), columns, counts, excess,
        )  # fmt: skip

    def solve(self, box: Floats, time_limit_s: float) -> Relaxed | None:
        """(1) to (5) with box[0] <= n_d <= box[1]; None: the solver was stopped."""
        from scipy.optimize import linprog  # heavy: on demand

        if time_limit_s <= 0:
            return None
        num, width = len(self.question.sizes), len(self.costs)
        bounds = np.stack([np.zeros(width), np.full(width, np.inf)], axis=1)
        bounds[:num] = box.T
        found = linprog(
            self.costs, A_ub=self.upper, b_ub=np.zeros(self.upper.shape[0]),
            A_eq=self.equal, b_eq=self.counts, bounds=bounds, method="highs",
            options={"time_limit": time_limit_s},
        )  # fmt: skip
        if found.x is None or found.status != 0:
            return None
        assigned = np.zeros(self.fits.shape)
        assigned[self.columns] = found.x[num : width - num]
        prices = np.maximum(-found.ineqlin.marginals, 0.0).reshape(num, -1).T
        groups = found.x[:num] + found.x[width - num :]
        return Relaxed(num_groups=groups, assigned=assigned, prices=prices)


def relaxed(
    question: Question, counts: Ints, num_ranks: int, seconds: float, *, time_limit_s: float
) -> Relaxed | None:
    """Solve (1) to (5); None where a sequence fits no group, or the solver was stopped."""
    program = _Fixed.of(question, counts, num_ranks, seconds)
    num = len(question.sizes)
    anything = np.stack([np.zeros(num), np.full(num, np.inf)])
    return program.solve(anything, time_limit_s) if program is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """Groups by size, and the sequences of each class that go to each [size, class]."""

    groups: dict[int, int]
    assigned: Floats

    @staticmethod
    def of(sizes: Ints, values: Floats, assigned: Floats) -> Whole:
        """Values of n_d that are whole but for rounding."""
        taken = zip(sizes.tolist(), np.round(values).astype(int).tolist(), strict=True)
        return Whole(groups={d: n for d, n in taken if n}, assigned=assigned)


def whole_groups(
    question: Question, counts: Ints, num_ranks: int, seconds: float, *, time_limit_s: float
) -> Whole | None:
    """Any n_d, whole, of at most `num_ranks` ranks with (2) to (5); None: none was found in time.

    What it finds is a suggestion: a placement shows what it is worth, and no bound rests on it.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # heavy: on demand

    if seconds <= question.fixed_s or time_limit_s <= 0:
        return None
    parts, fits = question.parts(seconds)
    if not fits.any(axis=0).all():
        return None
    upper, equal, costs, (size, kind) = matrices(question, parts, fits)
    num = len(question.sizes)
    found = milp(
        costs,
        constraints=[
            LinearConstraint(upper, -np.inf, 0),
            LinearConstraint(equal, counts, counts),
            LinearConstraint(costs[None, :], 0, num_ranks),
        ],
        bounds=Bounds(0, np.concatenate([num_ranks // question.sizes, counts[kind]])),
        integrality=np.concatenate([np.ones(num), np.zeros(len(size))]),
        options={"time_limit": time_limit_s, "mip_rel_gap": 1.0},
    )
    if found.x is None:
        return None
    assigned = np.zeros(fits.shape)
    assigned[size, kind] = found.x[num:]
    return Whole.of(question.sizes, found.x[:num], assigned)


def matrices(
    question: Question, parts: Floats, fits: NDArray[np.bool_]
) -> tuple[Any, Any, Floats, tuple[Ints, Ints]]:
    """Rows (2) to (4) by size, rows (5), costs, and (size, class) of the columns after the n_d."""
    from scipy.sparse import coo_array, csr_array

    num, each = len(question.sizes), parts.shape[0]
    size, kind = np.nonzero(fits)
    column = num + np.arange(len(size))
    values = parts[:, size, kind]
    row = size[None, :] * each + np.arange(each)[:, None]
    width = num + len(size)
    upper = csr_array(coo_array(
        (np.concatenate([values.ravel(), np.tile(-Z, num)]),
         (np.concatenate([row.ravel(), np.arange(num * each)]),
          np.concatenate([np.tile(column, each), np.repeat(np.arange(num), each)]))),
        shape=(num * each, width),
    ))  # fmt: skip
    upper.eliminate_zeros()
    equal = csr_array(coo_array((np.ones(len(size)), (kind, column)), shape=(fits.shape[1], width)))
    costs = np.concatenate([question.sizes.astype(np.float64), np.zeros(len(size))])
    return upper, equal, costs, (size, kind)


def needed_ranks(question: Question, prices: Floats, seconds: float) -> float:
    """Left side of (7): more than there are proves that C is too short; infinite: one fits nowhere.

    `prices` [row, size] may be anything that is not negative.
    """
    if seconds <= question.fixed_s:
        return math.inf
    parts, fits = question.parts(seconds)
    price = np.einsum("rd,r->d", prices, Z)
    scale = np.divide(question.sizes, price, out=np.zeros(len(price)), where=price > 0)
    worth = np.einsum("rd,rdk->dk", prices * scale, parts)
    least = np.where(fits, worth, np.inf).min(axis=0)
    return float(least.sum()) * (1 - SAFE_FRAC)


def trivial_bound_s(question: Question, num_ranks: int) -> float:
    """The slowest sequence in its best group, and the least work over all ranks."""
    fits = question.room_fracs <= 1 + SAFE_FRAC
    alone = np.where(fits, question.weights, np.inf).min(axis=0).max()
    work = (question.weights * question.sizes[:, None]).min(axis=0).sum() / num_ranks
    return question.fixed_s + max(float(alone), float(work)) * (1 - SAFE_FRAC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """No grouping is faster than `seconds`; `prices` prove it (None: the trivial bound does)."""

    seconds: float
    prices: Floats | None
    num_programs: int


def lower_bound_s(
    held: Ints, cost: GroupCost, num_ranks: int, *, upper_s: float, time_limit_s: float = 2.0
) -> Bound:
    """The longest makespan proven too short; `upper_s` is some plan's, beyond which none is."""
    end = time.perf_counter() + time_limit_s
    every = Question.of(held, cost, num_ranks)
    kinds = classes(held)
    question = Question.of(kinds.means, cost, num_ranks)
    low, prices, rounds = trivial_bound_s(every, num_ranks), None, 0
    while rounds < MOST_ROUNDS and low < upper_s * (1 - RISE_FRAC):
        rounds += 1
        left_s = end - time.perf_counter()
        point = low * (1 + RISE_FRAC)
        found = relaxed(question, kinds.counts, num_ranks, point, time_limit_s=left_s)
        if found is None or needed_ranks(every, found.prices, point) <= num_ranks:
            break
        low, prices = _furthest(every, found.prices, num_ranks, point, upper_s), found.prices
    return Bound(seconds=min(low, upper_s), prices=prices, num_programs=rounds)


def _furthest(
    question: Question, prices: Floats, num_ranks: int, low: float, high: float
) -> float:  # fmt: skip
    """By bisection a long makespan that these prices prove too short, at least `low`."""
    step = (high - low) / 64
    while low + step < high and needed_ranks(question, prices, low + step) > num_ranks:
        low, step = low + step, 2 * step
    for _ in range(10):
        step /= 2
        if needed_ranks(question, prices, low + step) > num_ranks:
            low += step
    return low


# ---- whole numbers of groups -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Branched:
    """What a search over whole n_d says of a makespan: `is_short` is proven.

    Where it is not, `whole` may hold groups that the program allows.
    """

    is_short: bool
    whole: Whole | None = None
    num_programs: int = 0


def branched(
    held: Ints, cost: GroupCost, num_ranks: int, seconds: float, *, time_limit_s: float
) -> Branched:
    """Branch on the n_d; a box is left behind when prices prove, for it, more than N ranks:

        sum_k min_d worth_d(s_k) + sum_d min over n_d of n_d (d - price_d) > N               (9)

    with unscaled worths, once more in plain arithmetic over the sequences themselves.
    """
    end = time.perf_counter() + time_limit_s
    every, kinds = Question.of(held, cost, num_ranks), classes(held)
    question = Question.of(kinds.means, cost, num_ranks)
    if seconds <= cost.fixed_s:
        return Branched(is_short=True)
    program = _Fixed.of(question, kinds.counts, num_ranks, seconds)
    if program is None:
        fits = every.parts(seconds)[1]
        return Branched(is_short=not bool(fits.any(axis=0).all()))
    parts, fits = every.parts(seconds)
    num = len(question.sizes)
    boxes = [np.stack([np.zeros(num), num_ranks // question.sizes.astype(np.float64)])]
    solved = 0
    while boxes:
        box = boxes.pop()
        found = program.solve(box, end - time.perf_counter())
        if found is None or solved >= MOST_BOXES:
            return Branched(is_short=False, num_programs=solved)
        solved += 1
        if _ranks_in(question.sizes, parts, fits, found.prices, box) > num_ranks:
            continue
        apart = np.abs(found.num_groups - np.round(found.num_groups))
        if apart.max() < WHOLE:
            whole = Whole.of(question.sizes, found.num_groups, found.assigned)
            return Branched(is_short=False, whole=whole, num_programs=solved)
        boxes += _halves(box, found.num_groups, int(np.argmax(apart)), question.sizes, num_ranks)
    return Branched(is_short=True, num_programs=solved)


MOST_BOXES: Final = 400
WHOLE: Final = 1e-6


def _ranks_in(
    sizes: Ints, parts: Floats, fits: NDArray[np.bool_], prices: Floats, box: Floats
) -> float:
    """Left side of (9)."""
    worth = np.einsum("rd,rdk->dk", prices, parts)
    least = float(np.where(fits, worth, np.inf).min(axis=0).sum())
    left = sizes - np.einsum("rd,r->d", prices, Z)
    slack = np.minimum(box[0] * left, box[1] * left)
    return least + float(slack.sum()) - SAFE_FRAC * (least + float(np.abs(slack).sum()))


def _halves(
    box: Floats, values: Floats, at: int, sizes: Ints, num_ranks: int
) -> list[Floats]:  # fmt: skip
    """The box below the value and the one above it, which is looked at first."""
    below, above = box.copy(), box.copy()
    below[1, at], above[0, at] = math.floor(values[at]), math.ceil(values[at])
    return [half for half in (below, above) if half[0] @ sizes <= num_ranks]

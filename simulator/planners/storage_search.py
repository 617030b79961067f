"""Stacks that waste no byte that the peak needs: many built at once, the best rules kept.

A stack of at most M bytes may waste M - live(t) bytes at a moment t and no more. Tensors are laid
one by one on the skyline of those below (Sekiyama et al. 2018, arXiv 1804.10001, section 3.3, place
the longest life that fits the lowest step). With h_i the highest step under tensor i, and

    room_i  = min_(t in i's life) (M - bytes of tensors alive at t and not yet laid)            (1)
    waste_i = sum_(t in i's life) w_t (h_i - skyline_t),   tight_i = sum_(t in i's life) w_t    (2)
    w_t     = 1 / (L - live(t) + c L), of sum 1;           L = max_t live(t)                    (3)

i can still be laid without raising the peak above M only if h_i <= room_i. The next tensor has the
least of

    (a h_i + b waste_i) / L - tight_i + noise + much (h_i - room_i)^+ / L                       (4)

so low places come first, waste counts where little is to spare, and moments with least to spare are
filled first, whether there is one peak or several. (a, b, c, noise, M) are a *rule*. A batch of
rules is followed at once, in arrays; the next batch is drawn around the best rules of all so far,
with a few at random (an evolution strategy, Beyer and Schwefel 2002).

    Implemented in: `Stacker.least` (1), `_Batch` (2 to 4), `best_stack` (the search).

Ignored: moments at which nothing ends before the next start (they ask for less than the next).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

BATCH: Final = 32
"""Stacks built together, of up to `BATCH_TENSORS`; fewer of more, so that a batch stays short."""
BATCH_TENSORS: Final = 400
LEAST_BATCH: Final = 4
RULES: Final = np.array([(0.7, 2.6), (-0.3, 1.5), (-3.5, -1.4), (-3.5, -0.5)])
"""Ranges of log10 (a, b, c, noise) that first rules are drawn from."""
NUM_BEST: Final = 6
"""Rules that the next ones are drawn around."""
CHILDREN_FRAC: Final = 7 / 8
CHANGED_FRAC: Final = 0.4
SPREAD: Final = 0.17
"""Standard deviation of a changed log10: a factor of 1.5."""
LOOSE_FRAC: Final = 0.7
"""Of the rules that aim above the live bytes, at most `MOST_LOOSE` and not above the best."""
MOST_LOOSE: Final = 0.05
MUCH: Final = 1e3
STEPS_PER_LOOK: Final = 32
"""Tensors laid between two looks at the clock."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Addresses of all tensors and the bytes they need together."""

    peak: int
    addresses: Ints


class Stacker:
    """Tensors in columns of time, and what of them all stacks share."""

    def __init__(self, sizes: Ints, starts: Ints, ends: Ints) -> None:
        self.sizes = sizes.astype(np.float64)
        self.first, self.stop = _columns(starts, ends)
        self.columns = np.arange(int(self.stop.max()))
        self.live = np.zeros(len(self.columns) + 1)
        np.add.at(self.live, self.first, self.sizes)
        np.add.at(self.live, self.stop, -self.sizes)
        self.live = self.live.cumsum()[:-1]
        self.most = float(self.live.max())
        level = np.floor(np.log2(self.stop - self.first)).astype(np.int64)
        width = len(self.columns)
        self.num_levels = int(level.max()) + 1
        self.left = level * width + self.first
        self.right = level * width + self.stop - 2**level

    def least(self, values: Floats) -> Floats:
        """The least value over each tensor's life, row by row: two overlapping powers of two."""
        width = len(self.columns)
        table = np.empty((len(values), self.num_levels, width))
        table[:, 0] = values
        for level in range(1, self.num_levels):
            half, below = 2 ** (level - 1), table[:, level - 1]
            table[:, level] = below
            np.minimum(
                below[:, : width - half], below[:, half:], out=table[:, level, : width - half]
            )
        flat = table.reshape(len(values), -1)
        found: Floats = np.minimum(flat[:, self.left], flat[:, self.right])
        return found


def _columns(starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Lives in columns of time: a new one begins at the first start after an end."""
    moments = np.unique(starts)
    first, stop = np.searchsorted(moments, starts), np.searchsorted(moments, ends)
    ended = np.zeros(len(moments) + 1, dtype=np.int64)
    ended[stop] = 1
    ended[0] = 0
    column = ended[:-1].cumsum()
    return column[first], column[stop - 1] + 1


class _Batch:
    """Stacks under construction, a row for each."""

    def __init__(self, of: Stacker, rules: Floats, aims: Floats, rng: np.random.Generator) -> None:
        num, many = len(rules), len(of.sizes)
        self.of, self.rows = of, np.arange(num)
        a, b, c, noise = 10.0 ** rules.T[:, :, None]
        weight = 1 / (of.most - of.live + c * of.most)
        self.weight = weight / weight.sum(axis=1, keepdims=True)
        self.tight = self._over_life(self.weight)
        self.low_cost, self.waste_cost = a / of.most, b / of.most
        self.fixed = noise * rng.random((num, many)) - self.tight
        self.steps = np.zeros((num, many))
        self.skyline = np.zeros((num, len(of.columns)))
        self.room = aims[:, None] - of.live
        self.peaks, self.addresses = np.zeros(num), np.zeros((num, many))

    def _over_life(self, values: Floats) -> Floats:
        """Sums over each tensor's life."""
        sums = np.zeros((len(values), values.shape[1] + 1))
        np.cumsum(values, axis=1, out=sums[:, 1:])
        found: Floats = sums[:, self.of.stop] - sums[:, self.of.first]
        return found

    def laid(self, until_s: float) -> bool:
        """Lay all tensors; False where the clock ran out before."""
        for done in range(len(self.of.sizes)):
            if done % STEPS_PER_LOOK == 0 and time.process_time() > until_s:
                return False
            self.lay()
        return True

    def lay(self) -> None:
        """One more tensor on every stack."""
        of, rows, steps = self.of, self.rows, self.steps
        waste = steps * self.tight - self._over_life(self.weight * self.skyline)
        beyond = np.maximum(steps - of.least(self.room), 0.0)
        cost = self.fixed + self.low_cost * steps + self.waste_cost * waste
        cost += beyond * (MUCH / of.most)
        picked = cost.argmin(axis=1)
        low, size = steps[rows, picked], of.sizes[picked]
        top = low + size
        self.addresses[rows, picked] = low
        self.peaks = np.maximum(self.peaks, top)
        self.fixed[rows, picked] = np.inf
        first, stop = of.first[picked, None], of.stop[picked, None]
        beside = (of.first < stop) & (of.stop > first)
        np.maximum(steps, top[:, None], out=steps, where=beside)
        alive = (of.columns >= first) & (of.columns < stop)
        np.copyto(self.skyline, top[:, None], where=alive)
        self.room += alive * size[:, None]


@dataclass(slots=True)
class _Rules:
    """The best rules so far with their peaks, and the next ones."""

    rng: np.random.Generator
    rules: Floats
    peaks: Floats

    def next(self, num: int) -> Floats:
        """Children of the best, and a few at random."""
        low, high = RULES.T
        found: Floats = low + (high - low) * self.rng.random((num, len(RULES)))
        if len(self.rules):
            most = int(num * CHILDREN_FRAC)
            parents = self.rules[self.rng.integers(len(self.rules), size=most)]
            changed = self.rng.random(parents.shape) < CHANGED_FRAC
            found[:most] = parents + changed * self.rng.normal(0.0, SPREAD, parents.shape)
        return found

    def learn(self, rules: Floats, peaks: Floats) -> None:
        """Keep the best of the old and the new."""
        rules, peaks = np.vstack([self.rules, rules]), np.concatenate([self.peaks, peaks])
        kept = np.argsort(peaks, kind="stable")[:NUM_BEST]
        self.rules, self.peaks = rules[kept], peaks[kept]


def best_stack(
    sizes: Ints, starts: Ints, ends: Ints, *, peak: int, goal: int, until_s: float, seed: int
) -> Stack | None:
    """The best stack built until one needs at most `goal` or the clock shows `until_s`.

    None where none needs less than `peak`. The clock is the process's own (`time.process_time`):
    seconds of one core.

    >>> found = best_stack(np.array([4, 2, 4]), np.array([0, 0, 2]), np.array([2, 4, 4]),
    ...                    peak=10, goal=6, until_s=np.inf, seed=0)
    >>> found.peak
    6
    """
    stacker = Stacker(sizes, starts, ends)
    rng = np.random.default_rng(seed)
    known = _Rules(rng=rng, rules=np.empty((0, len(RULES))), peaks=np.empty(0))
    num = min(max(BATCH * BATCH_TENSORS // len(sizes), LEAST_BATCH), BATCH)
    best: Stack | None = None
    while True:
        rules = known.next(num)
        above = min((best.peak if best else peak) / stacker.most - 1, MOST_LOOSE)
        loose = above * rng.random(num) * (rng.random(num) < LOOSE_FRAC)
        batch = _Batch(stacker, rules, stacker.most * (1 + loose), rng)
        if not batch.laid(until_s):
            return best
        known.learn(rules, batch.peaks)
        lowest = int(batch.peaks.argmin())
        if batch.peaks[lowest] < (best.peak if best else peak):
            addresses = batch.addresses[lowest].astype(np.int64)
            best = Stack(int(batch.peaks[lowest]), addresses)
            if best.peak <= goal:
                return best

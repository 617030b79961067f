"""Layers to pipeline stages and modes to layers, for one mesh: exact, by a table and a recursion.

With m micro-batches on p stages of v chunks, stage i takes t_i for one of them, T = max t_i:

    step    = m T + (sum t_i - T) / v + fixed + max_i after_i                                (1)
    t_i     = min over the modes of its layers (`modes.best_modes`) that fit, plus its end   (2)
    after_i = what nothing hides of stage i's gradients and weights, and its update: its own
              parameters, under its own passes                                               (3)

    stage table   tau_i(a, l): (2) for l layers from layer a on; for layers of one kind, any a
    recursion     S_i(b) = min_l S_(i-1)(b - l) + tau_i(b - l, l), over l with tau <= T and
                  after < X

For every entry T of the table, ascending, the recursion finds the least sum, then again with X at
the `after` of what it found, until m T + (S - T) / v + least after is not below the best found. All
of (1) rises with T, the sum and the largest after, so that what is left out is not better: the gap
is proven 0. Modes are the fastest that fit: recomputing more than memory asks for, only to hide
exchange longer, is not sought.

Chunks of a stage are equal: it holds a multiple of v layers. Layers of several kinds under v > 1
have equal stages (their order decides what each chunk holds), only modes are chosen.

    Implemented in: `objective` (1, 3), `StageTable` (2), `_Recursion`, `_Search` (the loop).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from simulator.planners.modes import Chosen, LayerKind, Limits, best_modes
from workloads.numeric import Array

Ints: TypeAlias = NDArray[np.int64]
After: TypeAlias = Callable[[Array, Array, Array, Array], Array]
"""(dense, experts, forward_s, backward_s) -> seconds after the pipeline of such stages."""
States: TypeAlias = Callable[[Array, Array], Array]
"""(dense, experts) -> bytes that stages with such parameters hold all step long."""

SLACK: Final = 1e-9
"""Relative room for rounding in what is left out as too slow or too large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndPart:
    """What the first or the last stage has beside its layers.

    `kept_bytes` are held for every micro-batch in flight, `fixed_bytes` once.
    """

    seconds: float = 0.0
    kept_bytes: float = 0.0
    fixed_bytes: float = 0.0
    dense: float = 0.0
    experts: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StageProblem:
    """One mesh: `sequence[j]` is the kind of layer j; `in_flight[i]` counts whole stages."""

    num_stages: int
    num_chunks: int
    num_micro: float
    kinds: tuple[LayerKind, ...]
    sequence: tuple[int, ...]
    first: EndPart
    last: EndPart
    in_flight: tuple[float, ...]
    limits: Limits
    states: States
    after: After
    fixed_s: float = 0.0
    fixed_bytes: float = 0.0

    @property
    def num_layers(self) -> int:
        """All layers."""
        return len(self.sequence)

    @property
    def slope(self) -> float:
        """What a second of the slowest stage costs, others unchanged: m - 1 / v."""
        return self.num_micro - 1 / self.num_chunks

    def ends(self, stage: int) -> Iterator[EndPart]:
        """The ends that a stage has."""
        if stage == 0:
            yield self.first
        if stage == self.num_stages - 1:
            yield self.last

    @cached_property
    def prefix(self) -> Ints:
        """`prefix[j, k]`: layers of kind k among the first j."""
        one_hot = np.eye(len(self.kinds), dtype=np.int64)[list(self.sequence)]
        return np.vstack([np.zeros((1, len(self.kinds)), dtype=np.int64), one_hot.cumsum(axis=0)])


class Choice(NamedTuple):
    """Modes of a stage's layers: `counts[k][j]` layers of kind k in mode j."""

    seconds: float
    forward_s: float
    backward_s: float
    dense: float
    experts: float
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Layers and modes of every stage, and the step's seconds."""

    layers: tuple[int, ...]
    choices: tuple[Choice, ...]
    seconds: float


def after_seconds(problem: StageProblem, choices: Sequence[Choice]) -> Array:
    """(3) of every stage."""
    figures = np.array([(c.dense, c.experts, c.forward_s, c.backward_s) for c in choices])
    return problem.after(*figures.T)


def objective(problem: StageProblem, choices: Sequence[Choice]) -> float:
    """Equation (1)."""
    slowest = max(c.seconds for c in choices)
    total = sum(c.seconds for c in choices)
    pipeline = problem.num_micro * slowest + (total - slowest) / problem.num_chunks
    return pipeline + problem.fixed_s + float(after_seconds(problem, choices).max())


@dataclass(frozen=True, kw_only=True)
class StageTable:
    """tau_i(a, l) for every stage i, start a and number of layers l of a window.

    Layers of one kind: any start will do, and only a = 0 is held. `seconds[i]` has a row for each
    start and a column for each l of `sizes[i]`; infinite where nothing fits.
    """

    problem: StageProblem
    sizes: tuple[Ints, ...]
    seconds: tuple[Array, ...]
    cells: dict[tuple[int, int, int], Choice] = field(repr=False)

    @property
    def uniform(self) -> bool:
        """Are all layers alike?"""
        return len(self.problem.kinds) == 1

    def cell(self, stage: int, start: int, size: int) -> Choice:
        """The modes behind an entry."""
        return self.cells[stage, 0 if self.uniform else start, size]


def stage_table(problem: StageProblem, most_s: float = math.inf) -> StageTable | None:
    """The table of layers that may be of use: stages up to `most_s`; None where a stage is empty.

    A stage has at least what the others cannot take.
    """
    builder = _Builder(problem)
    sizes = builder.windows(most_s)
    if sizes is None:
        return None
    table = builder.table(sizes)
    return table if all(np.isfinite(own).any() for own in table.seconds) else None


def hull_lines(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(c, d) of the lines c - d x under the lower hull of points (x, y), falling ones and flat.

    >>> hull_lines([(0.0, 4.0), (2.0, 3.0), (4.0, 1.0), (5.0, 2.0)])
    [(4.0, 0.75), (1.0, 0.0)]
    """
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        if hull and hull[-1][0] == x:
            hull.pop()
        hull.append((x, y))
    lines = []
    for (x0, y0), (x1, y1) in pairwise(hull):
        slope = (y0 - y1) / (x1 - x0)
        lines.append((y0 + slope * x0, slope))
    return [*lines, (hull[-1][1], 0.0)]


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Does b lie on or above the line from a to c?"""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


class _Builder:
    def __init__(self, problem: StageProblem) -> None:
        self.problem, self.p, self.v = problem, problem.num_stages, problem.num_chunks
        self.uniform = len(problem.kinds) == 1
        self.flight = np.array(problem.in_flight)

    def windows(self, most_s: float) -> tuple[Ints, ...] | None:
        """Sizes each stage may have: time and states of the leanest modes, then the others'."""
        problem, v = self.problem, self.v
        total, p = problem.num_layers, self.p
        if total < p * v or total % v:
            return None
        if v > 1 and not self.uniform:
            if total % (p * v):
                return None
            return tuple(np.array([total // p]) for _ in range(p))
        sizes = np.arange(v, total - (p - 1) * v + 1, v, dtype=np.int64)
        fits = self._fits(sizes.astype(np.float64), most_s)
        most = [int(sizes[row].max(initial=0)) for row in fits]
        spare = sum(most) - total
        if spare < 0 or not min(most):
            return None
        return tuple(np.arange(max(top - spare, v), top + 1, v) for top in most)

    def _fits(self, sizes: Array, most_s: float) -> NDArray[np.bool_]:
        """Stages by sizes: would the leanest layers fit in time and memory?

        For any d >= 0, sum t >= sum of min (t + d kept) over the layers - d sum kept; the slopes of
        the kinds' lower hulls are tried. Layers are those with the least sum.
        """
        problem, kinds, flight = self.problem, self.problem.kinds, self.flight[:, None]
        ends = [list(problem.ends(i)) for i in range(self.p)]
        beside = {
            name: np.array([[sum(getattr(e, name) for e in own)] for own in ends], dtype=float)
            for name in ("seconds", "kept_bytes", "fixed_bytes", "dense", "experts")
        }
        dense = self._least_sum([k.dense for k in kinds], sizes) + beside["dense"]
        experts = self._least_sum([k.experts for k in kinds], sizes) + beside["experts"]
        room = problem.limits.budget_bytes * (1 + SLACK) - problem.states(dense, experts)
        room = room - problem.fixed_bytes - beside["fixed_bytes"] - flight * beside["kept_bytes"]
        kept = self._least_sum([min(m.kept_bytes for m in k.modes) for k in kinds], sizes)
        fits: NDArray[np.bool_] = flight * kept <= room
        slopes = {
            slope
            for kind in kinds
            for _, slope in hull_lines([(m.kept_bytes, m.seconds) for m in kind.modes])
        }
        for slope in sorted(slopes):
            level = [min(m.seconds + slope * m.kept_bytes for m in k.modes) for k in kinds]
            seconds = self._least_sum(level, sizes) - slope * room / flight + beside["seconds"]
            fits &= seconds <= most_s * (1 + SLACK)
        return fits

    def _least_sum(self, values: Sequence[float], sizes: Array) -> Array:
        """The least sum of a value over so many layers, of each kind as many as there are."""
        counts = self.problem.prefix[-1]
        order = np.argsort(values, kind="stable")
        ends = np.concatenate([[0], np.cumsum(counts[order])])
        sums = np.concatenate([[0.0], np.cumsum(counts[order] * np.asarray(values)[order])])
        found: Array = np.interp(sizes, ends, sums)
        return found

    def table(self, sizes: tuple[Ints, ...]) -> StageTable:
        cells: dict[tuple[int, int, int], Choice] = {}
        starts = 1 if self.uniform else self.problem.num_layers
        seconds = [np.full((starts, len(own)), math.inf) for own in sizes]
        wanted = self._wanted(sizes)
        for counts, places in wanted.items():
            for (i, start, column), choice in self._chosen(counts, places):
                seconds[i][start, column] = choice.seconds
                cells[i, start, int(sizes[i][column])] = choice
        return StageTable(problem=self.problem, sizes=sizes, seconds=tuple(seconds), cells=cells)

    def _wanted(self, sizes: tuple[Ints, ...]) -> dict[tuple[int, ...], list[tuple[int, int, int]]]:
        """(stage, start, column) by what layers they hold: equal ones are looked at together."""
        found: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        problem, total = self.problem, self.problem.num_layers
        if self.uniform:
            for i, own in enumerate(sizes):
                for column, size in enumerate(own):
                    found.setdefault((int(size),), []).append((i, 0, column))
            return found
        if self.v > 1:
            for i in range(self.p):
                found.setdefault(self._interleaved(i), []).append((i, i * (total // self.p), 0))
            return found
        low = high = 0
        for i, own in enumerate(sizes):
            for start in range(low, min(high, total) + 1):
                for column, size in enumerate(own):
                    stop = start + int(size)
                    if stop <= total and (i < self.p - 1 or stop == total):
                        counts = tuple(int(n) for n in problem.prefix[stop] - problem.prefix[start])
                        found.setdefault(counts, []).append((i, start, column))
            low, high = low + int(own[0]), high + int(own[-1])
        return found

    def _interleaved(self, stage: int) -> tuple[int, ...]:
        """Layers of every kind on a stage of v equal chunks, p chunks apart."""
        size = self.problem.num_layers // (self.p * self.v)
        starts = [(c * self.p + stage) * size for c in range(self.v)]
        held = sum(self.problem.prefix[s + size] - self.problem.prefix[s] for s in starts)
        return tuple(int(n) for n in held)

    def _chosen(
        self, counts: tuple[int, ...], places: list[tuple[int, int, int]]
    ) -> Iterator[tuple[tuple[int, int, int], Choice]]:
        """Choices of all places that hold these layers; stages that fit nothing are left out."""
        problem = self.problem
        stages = sorted({i for i, _, _ in places})
        dense = sum(n * k.dense for n, k in zip(counts, problem.kinds, strict=True))
        experts = sum(n * k.experts for n, k in zip(counts, problem.kinds, strict=True))
        forward_s = sum(n * k.forward_s for n, k in zip(counts, problem.kinds, strict=True))
        ends = [list(problem.ends(i)) for i in stages]
        own_dense = np.array([dense + sum(e.dense for e in own) for own in ends], dtype=float)
        own_experts = np.array([experts + sum(e.experts for e in own) for own in ends], dtype=float)
        flight = self.flight[stages]
        kept = np.array([sum(e.kept_bytes for e in own) for own in ends], dtype=float)
        fixed = np.array([sum(e.fixed_bytes for e in own) for own in ends], dtype=float)
        free = problem.limits.budget_bytes - problem.states(own_dense, own_experts)
        free = free - fixed - flight * kept - problem.fixed_bytes
        found = best_modes(
            problem.kinds, counts, in_flight=flight, free_bytes=free, limits=problem.limits
        )
        of_stage = {
            stage: _choice(
                found, row, sum(e.seconds for e in ends[row]), forward_s,
                float(own_dense[row]), float(own_experts[row]),
            )
            for row, stage in enumerate(stages)
            if math.isfinite(found.seconds[row])
        }  # fmt: skip
        for place in places:
            if place[0] in of_stage:
                yield place, of_stage[place[0]]


def _choice(
    found: Chosen, row: int, end_s: float, forward_s: float, dense: float, experts: float
) -> Choice:
    return Choice(
        seconds=float(found.seconds[row]) + end_s,
        forward_s=forward_s,
        backward_s=float(found.backward_s[row]),
        dense=dense,
        experts=experts,
        counts=tuple(tuple(int(n) for n in rows[row]) for rows in found.counts),
    )


class _Recursion:
    """S_i(b) over a table whose entries above a time, or with a long `after`, are taken out."""

    def __init__(self, table: StageTable, allowed: tuple[Array, ...]) -> None:
        """`allowed[i]` is the table of stage i with infinity where it may not be used."""
        self.table, self.allowed = table, allowed
        total = table.problem.num_layers
        sums = np.full(total + 1, math.inf)
        sums[0] = 0.0
        self.before = [sums]
        self.picks: list[Ints] = []
        for own, sizes in zip(allowed, table.sizes, strict=True):
            sums, pick = _next(sums, own, sizes)
            self.before.append(sums)
            self.picks.append(pick)

    @property
    def total_s(self) -> float:
        """The least sum of all stages' seconds."""
        return float(self.before[-1][self.table.problem.num_layers])

    def layers(self) -> tuple[int, ...]:
        """How many each stage has in that sum."""
        left, found = self.table.problem.num_layers, []
        for i in range(len(self.picks) - 1, -1, -1):
            size = int(self.table.sizes[i][self.picks[i][left]])
            found.append(size)
            left -= size
        return tuple(reversed(found))


def _next(sums: Array, own: Array, sizes: Ints) -> tuple[Array, Ints]:
    """min over l of S(b - l) + tau(b - l, l), and which l."""
    best = np.full(len(sums), math.inf)
    pick = np.zeros(len(sums), dtype=np.int64)
    for column, size in enumerate(sizes):
        step = own[:, column] if len(own) > 1 else own[0, column]
        reached = sums[: len(sums) - size] + (
            step[: len(sums) - size] if isinstance(step, np.ndarray) else step
        )
        better = reached < best[size:]
        best[size:] = np.where(better, reached, best[size:])
        pick[size:] = np.where(better, column, pick[size:])
    return best, pick


def best_layout(problem: StageProblem, below_s: float = math.inf) -> Layout | None:
    """The fastest layout if it takes less than `below_s`, else None: proven either way."""
    most_s = (below_s - problem.fixed_s) / problem.num_micro
    table = stage_table(problem, most_s)
    return None if table is None else _Search(table, below_s).run()


class _Search:
    """The loop over slowest times; see the module's equations."""

    def __init__(self, table: StageTable, below_s: float) -> None:
        self.table, self.problem = table, table.problem
        self.best: Layout | None = None
        self.best_s = below_s
        self.after = self._after()
        self.least_after_s = max(float(own.min()) for own in self.after)

    def run(self) -> Layout | None:
        free_s = _Recursion(self.table, self.table.seconds).total_s
        if not math.isfinite(free_s):
            return None
        for slowest_s in self._slowest():
            if self._bound(slowest_s, free_s, self.least_after_s) >= self.best_s:
                break
            self._with(slowest_s)
        return self.best

    def _bound(self, slowest_s: float, total_s: float, after_s: float) -> float:
        problem = self.problem
        pipeline = problem.slope * slowest_s + total_s / problem.num_chunks
        return pipeline + problem.fixed_s + after_s

    def _slowest(self) -> Iterator[float]:
        """Times that the slowest stage may have, ascending, from where all layers have a place."""
        times = np.unique(np.concatenate([s[np.isfinite(s)] for s in self.table.seconds]))
        low, high = 0, len(times) - 1
        while low < high:
            middle = (low + high) // 2
            if self._holds_all(float(times[middle])):
                high = middle
            else:
                low = middle + 1
        yield from (float(t) for t in times[low:])

    def _holds_all(self, slowest_s: float) -> bool:
        most = 0
        for own, sizes in zip(self.table.seconds, self.table.sizes, strict=True):
            usable = np.flatnonzero((own <= slowest_s).any(axis=0))
            if not len(usable):
                return False
            most += int(sizes[usable[-1]])
        return most >= self.problem.num_layers

    def _with(self, most_s: float) -> None:
        """Layouts up to that slowest time: the least sum, then less `after` for more of it."""
        cap = math.inf
        while True:
            allowed = tuple(
                np.where((own <= most_s) & (late < cap), own, math.inf)
                for own, late in zip(self.table.seconds, self.after, strict=True)
            )
            found = _Recursion(self.table, allowed)
            if self._bound(most_s, found.total_s, self.least_after_s) >= self.best_s:
                return
            layout, cap = self._layout(found.layers())
            if layout.seconds < self.best_s:
                self.best, self.best_s = layout, layout.seconds
            if cap <= self.least_after_s:
                return

    def _after(self) -> list[Array]:
        """`after` of every entry; infinite where there is none."""
        table = self.table
        found = [np.full(own.shape, math.inf) for own in table.seconds]
        for (stage, start, size), value in zip(
            table.cells, after_seconds(self.problem, list(table.cells.values())), strict=True
        ):
            found[stage][start, int(np.searchsorted(table.sizes[stage], size))] = value
        return found

    def _layout(self, layers: tuple[int, ...]) -> tuple[Layout, float]:
        """The layout of those layers, and its largest `after`."""
        starts = np.concatenate([[0], np.cumsum(layers)])
        choices = tuple(self.table.cell(i, int(starts[i]), size) for i, size in enumerate(layers))
        layout = Layout(layers=layers, choices=choices, seconds=objective(self.problem, choices))
        return layout, float(after_seconds(self.problem, choices).max())

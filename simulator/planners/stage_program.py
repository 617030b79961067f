"""One mesh's stage problem as a mixed-integer program: what the recursion of `stages` is held to.

With x_(i,a,l) = 1 where stage i has l layers from layer a on, and n_(i,k,j) layers of kind k of
stage i in mode j (all of them counts: layers of a kind are alike),

    min  (m - 1 / v) T + sum_i t_i / v + fixed + Z                                           (1)
    s.t. sum_(a,l) x_(i,a,l) = 1;  stage i + 1 begins where stage i ends, the last at the end (2)
         sum_j n_(i,k,j) = sum_(a,l) x_(i,a,l) (layers of kind k among them)                 (3)
         t_i = sum n_(i,k,j) seconds + ends,   T >= t_i                                      (4)
         Z >= sum x_(i,a,l) after(parameters of these layers, longest backward passes)       (5)
         sum x (states + fixed) + in_flight sum n kept + W_i <= budget,
         W_i >= working_j where u_(i,k,j) = 1,   n_(i,k,j) <= layers u_(i,k,j)               (6)
         in_flight sum n host <= host memory;  sum n host <= host rate * forward seconds     (7)

Its optimum is that of `stages.best_layout` where `after` does not depend on the modes; where it
does, (5) takes the longest passes of any mode, so that the program is a bound from below. Without
integrality it is the relaxation in count variables; `relaxed_seconds` lifts it by what whole layers
allow: some stage has at least v ceil(L / (p v)) layers, each of at least its fastest mode's time.

    Implemented in: `stage_program` (1 to 7), `relaxed_seconds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from simulator.planners.program import AT_LEAST, AT_MOST, EQUAL, INFEASIBLE, Program, Row, Variable
from simulator.planners.program import solve as solved
from simulator.planners.stages import StageProblem

SLOWEST, AFTER = "T", "Z"
SCALE_FLOOR: Final = 1e-300


@dataclass(frozen=True, slots=True)
class _Column:
    """One x: a stage with `counts` layers of each kind, from `start` to `stop`."""

    name: str
    stage: int
    start: int
    stop: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class _Writer:
    """Columns, variables and rows of one problem."""

    problem: StageProblem

    @cached_property
    def columns(self) -> tuple[_Column, ...]:
        """Every x: any split for v = 1 or layers of one kind, equal stages otherwise."""
        problem, v = self.problem, self.problem.num_chunks
        total, p = problem.num_layers, problem.num_stages
        if v > 1 and len(problem.kinds) > 1:
            return tuple(self._equal()) if total % (p * v) == 0 else ()
        return tuple(
            _Column(f"x[{i},{a},{size}]", i, a, a + size,
                    tuple(int(n) for n in problem.prefix[a + size] - problem.prefix[a]))
            for i in range(p)
            for a in range(total) if (a == 0 if i == 0 else a >= i)
            for size in range(v, total - a + 1, v)
            if i < p - 1 or a + size == total
        )  # fmt: skip

    def _equal(self) -> Iterator[_Column]:
        problem, p, v = self.problem, self.problem.num_stages, self.problem.num_chunks
        size = problem.num_layers // (p * v)
        for i in range(p):
            starts = [(c * p + i) * size for c in range(v)]
            held = sum(problem.prefix[s + size] - problem.prefix[s] for s in starts)
            counts = tuple(int(n) for n in held)
            yield _Column(f"x[{i}]", i, i * size * v, (i + 1) * size * v, counts)

    def of(self, stage: int) -> list[_Column]:
        """The columns of a stage."""
        return [c for c in self.columns if c.stage == stage]

    def count(self, stage: int, kind: int, mode: int) -> str:
        """The name of an n."""
        return f"n[{stage},{self.problem.kinds[kind].name},{self._mode(kind, mode)}]"

    def used(self, stage: int, kind: int, mode: int) -> str:
        """The name of a u."""
        return f"u[{stage},{self.problem.kinds[kind].name},{self._mode(kind, mode)}]"

    def _mode(self, kind: int, mode: int) -> str:
        return self.problem.kinds[kind].modes[mode].name

    def modes(self) -> Iterator[tuple[int, int]]:
        """Kinds with their modes."""
        for k, kind in enumerate(self.problem.kinds):
            yield from ((k, j) for j in range(len(kind.modes)))

    # ---- rows ------------------------------------------------------------------------------

    def split(self) -> Iterator[Row]:
        """(2)."""
        p, total = self.problem.num_stages, self.problem.num_layers
        for i in range(p):
            yield Row(f"one layout of stage {i}", {c.name: 1.0 for c in self.of(i)}, EQUAL, 1.0)
        for i in range(p - 1):
            for b in range(1, total):
                terms = {c.name: 1.0 for c in self.of(i) if c.stop == b}
                terms |= {c.name: -1.0 for c in self.of(i + 1) if c.start == b}
                if terms:
                    yield Row(f"stage {i + 1} from layer {b}", terms, EQUAL, 0.0)

    def counted(self, stage: int) -> Iterator[Row]:
        """(3)."""
        for k, kind in enumerate(self.problem.kinds):
            terms = {self.count(stage, k, j): 1.0 for j in range(len(kind.modes))}
            terms |= {c.name: -float(c.counts[k]) for c in self.of(stage)}
            yield Row(f"layers of {kind.name} on stage {stage}", terms, EQUAL, 0.0)

    def timed(self, stage: int) -> Iterator[Row]:
        """(4)."""
        ends_s = sum(e.seconds for e in self.problem.ends(stage))
        terms = {
            self.count(stage, k, j): self.problem.kinds[k].modes[j].seconds
            for k, j in self.modes()
        }  # fmt: skip
        yield Row(f"seconds of stage {stage}", {**terms, f"t[{stage}]": -1.0}, EQUAL, -ends_s)
        yield Row(f"slowest of stage {stage}", {f"t[{stage}]": 1.0, SLOWEST: -1.0}, AT_MOST, 0.0)

    def later(self, stage: int) -> Row:
        """(5)."""
        problem, columns = self.problem, self.of(stage)
        dense, experts = self._held(stage)
        forward_s = [self._over(c, [k.forward_s for k in problem.kinds]) for c in columns]
        longest = [max(m.backward_s for m in k.modes) for k in problem.kinds]
        backward_s = [self._over(c, longest) for c in columns]
        after = problem.after(dense, experts, np.array(forward_s), np.array(backward_s))
        terms = {c.name: -float(a) for c, a in zip(columns, after, strict=True)}
        return Row(f"after stage {stage}", {AFTER: 1.0, **terms}, AT_LEAST, 0.0)

    def memory(self, stage: int) -> Iterator[Row]:
        """(6), in shares of the budget."""
        problem, flight = self.problem, self.problem.in_flight[stage]
        budget = max(problem.limits.budget_bytes, SCALE_FLOOR)
        ends = list(problem.ends(stage))
        fixed = problem.fixed_bytes + sum(e.fixed_bytes + flight * e.kept_bytes for e in ends)
        states = (problem.states(*self._held(stage)) + fixed) / budget
        working = f"W[{stage}]"
        terms = {c.name: float(s) for c, s in zip(self.of(stage), states, strict=True)}
        terms[working] = 1.0
        for k, j in self.modes():
            mode = problem.kinds[k].modes[j]
            name, used = self.count(stage, k, j), self.used(stage, k, j)
            terms[name] = flight * mode.kept_bytes / budget
            most = float(problem.num_layers)
            yield Row(f"use of {name}", {name: 1.0, used: -most}, AT_MOST, 0.0)
            yield Row(f"working of {name}", {working: 1.0, used: -mode.working_bytes / budget},
                      AT_LEAST, 0.0)  # fmt: skip
        yield Row(f"memory of stage {stage}", terms, AT_MOST, 1.0)

    def host(self, stage: int) -> Iterator[Row]:
        """(7), in shares of what there is; no copies where there is nothing."""
        problem, flight = self.problem, self.problem.in_flight[stage]
        host = {
            self.count(stage, k, j): problem.kinds[k].modes[j].host_bytes
            for k, j in self.modes() if problem.kinds[k].modes[j].host_bytes
        }  # fmt: skip
        if not host:
            return
        unit = max(host.values())
        kept = {name: flight * size / unit for name, size in host.items()}
        yield Row(f"host memory of stage {stage}", kept, AT_MOST, problem.limits.host_bytes / unit)
        rate = problem.limits.host_bytes_per_s / unit
        forward = [k.forward_s for k in problem.kinds]
        terms = {name: size / unit for name, size in host.items()}
        terms |= {c.name: -rate * self._over(c, forward) for c in self.of(stage)}
        yield Row(f"host link of stage {stage}", terms, AT_MOST, 0.0)

    def _held(self, stage: int) -> tuple[np.ndarray, np.ndarray]:
        """Dense and expert parameters of each column."""
        kinds, ends = self.problem.kinds, list(self.problem.ends(stage))
        dense = [
            self._over(c, [k.dense for k in kinds]) + sum(e.dense for e in ends)
            for c in self.of(stage)
        ]  # fmt: skip
        experts = [
            self._over(c, [k.experts for k in kinds]) + sum(e.experts for e in ends)
            for c in self.of(stage)
        ]  # fmt: skip
        return np.array(dense, dtype=float), np.array(experts, dtype=float)

    @staticmethod
    def _over(column: _Column, values: list[float]) -> float:
        return float(sum(n * value for n, value in zip(column.counts, values, strict=True)))


def stage_program(problem: StageProblem) -> Program | None:
    """The program; None where no split has a layer for every chunk."""
    writer = _Writer(problem)
    stages = range(problem.num_stages)
    if not all(writer.of(i) for i in stages):
        return None
    most = float(problem.num_layers)
    variables = [Variable(SLOWEST), Variable(AFTER)]
    variables += [Variable(c.name, upper=1.0, whole=True) for c in writer.columns]
    rows = list(writer.split())
    objective = {SLOWEST: problem.slope, AFTER: 1.0}
    for i in stages:
        variables += [Variable(f"t[{i}]"), Variable(f"W[{i}]")]
        variables += [Variable(writer.count(i, k, j), 0, most, True) for k, j in writer.modes()]
        variables += [Variable(writer.used(i, k, j), 0, 1, True) for k, j in writer.modes()]
        rows += [*writer.counted(i), *writer.timed(i), writer.later(i)]
        rows += [*writer.memory(i), *writer.host(i)]
        objective[f"t[{i}]"] = 1 / problem.num_chunks
    return Program(
        name="stages of one mesh", variables=tuple(variables), rows=tuple(rows),
        objective=objective, constant=problem.fixed_s,
    )  # fmt: skip


def relaxed_seconds(problem: StageProblem) -> float:
    """A bound of (1): the relaxation, with T lifted to whole layers; infinite: nothing fits."""
    question = stage_program(problem)
    if question is None:
        return math.inf
    v, p = problem.num_chunks, problem.num_stages
    most = v * math.ceil(problem.num_layers / (p * v))
    least_s = min(m.seconds for k in problem.kinds for m in k.modes)
    lifted = question.with_rows(Row("whole layers", {SLOWEST: 1.0}, AT_LEAST, most * least_s))
    found = solved(lifted.relaxed(), explain=False)
    return math.inf if found.status == INFEASIBLE else found.bound

"""Why a program has no answer: an irreducible conflict by name, or a direction without end.

**Conflict.** Elastic filter: let every row be missed at a price of 1 a unit and minimise; a row
that is missed joins the conflict and may be missed no more, until the program is infeasible. Then
the deletion filter: drop each row, each bound, each whole-number demand in turn, for good where
the rest stays infeasible. What is left is infeasible, and feasible without any one of its members.

**Ray.** A direction d along which every feasible point stays feasible and improves:

    a_i . d <= 0 (>=, ==),   d_j >= 0 with a lower bound, <= 0 with an upper,   c . d = -1
    min sum_j |d_j|

so that few variables move. Source: Chinneck 2008, Feasibility and Infeasibility in Optimization,
chapters 6 and 7.

    Implemented in: `conflict_of` (both filters), `ray_of`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from simulator.planners.program import (
    AT_LEAST,
    AT_MOST,
    EQUAL,
    INFEASIBLE,
    MAXIMISE,
    Program,
    Row,
    Variable,
    solve,
)

FREE_LIMIT = 1e-7
"""A row missed by less than this, over its largest number, counts as met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Demands that cannot hold together; `irreducible`: without any one of them they can."""

    rows: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    irreducible: bool = True

    def __str__(self) -> str:
        parts = [*self.rows, *self.bounds, *(f"{name} whole" for name in self.whole)]
        return ", ".join(parts) or "nothing"


def conflict_of(program: Program, *, time_limit_s: float = 60.0) -> Conflict | None:
    """The conflict of an infeasible program; None where none was proven in the time.

    >>> p = Program(name="p", objective={}, variables=(Variable("x"), Variable("y", upper=2.0)),
    ...     rows=(Row("wish", {"x": 1.0, "y": 1.0}, AT_LEAST, 5.0), Row("x cap", {"x": 1.0},
    ...     AT_MOST, 2.0), Row("idle", {"y": 1.0}, AT_MOST, 9.0)))
    >>> str(conflict_of(p))
    'wish, x cap, y <= 2'
    """
    for one in program.variables:
        if one.lower > one.upper:
            return Conflict(bounds=(_lower(one), _upper(one)))
    search = _Search(time.perf_counter() + time_limit_s)
    blank = dataclasses.replace(program, objective={}, constant=0.0, boxes=())
    linear = blank.relaxed()
    start = linear if search.is_infeasible(linear) else blank
    suspects = search.elastic(start)
    if suspects is None or not search.is_infeasible(suspects):
        suspects = start
        if not search.is_infeasible(start):
            return None
    return search.reduced(suspects)


@dataclass(slots=True)
class _Search:
    """Infeasibility tests until a moment; what it could not test stays in the conflict."""

    until: float
    complete: bool = True

    def is_infeasible(self, program: Program) -> bool:
        """Proven infeasible in the time that is left."""
        left = self.until - time.perf_counter()
        if left <= 0:
            self.complete = False
            return False
        found = solve(program, time_limit_s=left, explain=False)
        self.complete &= found.has_point or found.status == INFEASIBLE
        return found.status == INFEASIBLE

    def elastic(self, program: Program) -> Program | None:
        """The program with the rows of a conflict only."""
        firm: list[str] = []
        while len(firm) <= len(program.rows):
            left = self.until - time.perf_counter()
            if left <= 0:
                return None
            found = solve(_elastic(program, firm), time_limit_s=left, explain=False)
            if found.status == INFEASIBLE:
                return _only(program, firm)
            if not found.has_point:
                return None
            missed = [
                row.name for i, row in enumerate(program.rows) if row.name not in firm
                and sum(found.values.get(f"{sign}{i}", 0.0) for sign in "+-") > FREE_LIMIT
            ]  # fmt: skip
            if not missed:
                return None
            firm += missed
        return None

    def reduced(self, program: Program) -> Conflict:
        """Deletion: rows, then bounds, then whole variables."""
        for row in program.rows:
            smaller = _only(program, [r.name for r in program.rows if r is not row])
            program = smaller if self.is_infeasible(smaller) else program
        used = {name for row in program.rows for name, c in row.terms.items() if c}
        bounds: list[str] = []
        whole: list[str] = []
        for i, one in enumerate(program.variables):
            for free, name, kept in _freed(one):
                smaller = _changed(program, i, free(program.variables[i]))
                if one.name not in used or self.is_infeasible(smaller):
                    program = smaller
                else:
                    (whole if kept == "whole" else bounds).append(name)
        return Conflict(
            rows=tuple(row.name for row in program.rows), bounds=tuple(bounds),
            whole=tuple(whole), irreducible=self.complete,
        )  # fmt: skip


def _freed(one: Variable) -> Iterator[tuple[Callable[[Variable], Variable], str, str]]:
    """What may be dropped of a variable: how, its name, its kind."""
    if math.isfinite(one.lower):
        yield (lambda v: dataclasses.replace(v, lower=-math.inf)), _lower(one), "bound"
    if math.isfinite(one.upper):
        yield (lambda v: dataclasses.replace(v, upper=math.inf)), _upper(one), "bound"
    if one.whole:
        yield (lambda v: dataclasses.replace(v, whole=False)), one.name, "whole"


def _lower(one: Variable) -> str:
    return f"{one.name} >= {one.lower:.12g}"


def _upper(one: Variable) -> str:
    return f"{one.name} <= {one.upper:.12g}"


def _only(program: Program, names: list[str]) -> Program:
    kept = set(names)
    return dataclasses.replace(program, rows=tuple(r for r in program.rows if r.name in kept))


def _changed(program: Program, at: int, variable: Variable) -> Program:
    variables = (*program.variables[:at], variable, *program.variables[at + 1 :])
    return dataclasses.replace(program, variables=variables)


def _elastic(program: Program, firm: list[str]) -> Program:
    """Every row that is not firm may be missed, at 1 over its largest number a unit."""
    fixed = set(firm)
    variables, rows = list(program.variables), []
    objective: dict[str, float] = {}
    for i, row in enumerate(program.rows):
        terms = dict(row.terms)
        size = max([abs(row.right), *map(abs, terms.values())], default=0.0) or 1.0
        signs = {AT_MOST: "-", AT_LEAST: "+", EQUAL: "+-"}[row.relation]
        for sign in signs if row.name not in fixed else "":
            name = f"{sign}{i}"
            variables.append(Variable(name))
            terms[name] = size if sign == "+" else -size
            objective[name] = 1.0
        rows.append(Row(row.name, terms, row.relation, row.right))
    return Program(
        name=program.name, variables=tuple(variables), rows=tuple(rows), objective=objective
    )


def ray_of(program: Program, *, time_limit_s: float = 60.0) -> tuple[str, ...]:
    """Variables that run without end while the objective improves; none: it is bounded.

    >>> ray_of(Program(name="p", objective={"x": -1.0}, variables=(Variable("x"), Variable("y")),
    ...     rows=(Row("r", {"x": 1.0, "y": -1.0}, AT_MOST, 1.0),)))
    ('x', 'y')
    """
    variables, both = [], []
    for one in program.variables:
        up = 0.0 if math.isfinite(one.upper) else math.inf
        down = 0.0 if math.isfinite(one.lower) else math.inf
        variables += [Variable(f"+{one.name}", 0.0, up), Variable(f"-{one.name}", 0.0, down)]
        both += [f"+{one.name}", f"-{one.name}"]
    rows = [Row(row.name, _split(row.terms), row.relation, 0.0) for row in program.rows]
    better = 1.0 if program.sense == MAXIMISE else -1.0
    rows.append(Row("the objective improves", _split(program.objective), EQUAL, better))
    found = solve(
        Program(name="ray", variables=tuple(variables), rows=tuple(rows),
                objective=dict.fromkeys(both, 1.0)),
        time_limit_s=time_limit_s, explain=False,
    )  # fmt: skip
    if not found.has_point:
        return ()
    moved = {name[1:] for name, value in found.values.items() if value > 0}
    return tuple(one.name for one in program.variables if one.name in moved)


def _split(terms: Mapping[str, float]) -> dict[str, float]:
    return {f"{sign}{name}": value if sign == "+" else -value
            for name, value in terms.items() for sign in "+-"}  # fmt: skip

"""The solver seam: linear and mixed-integer programs with names, and answers that do not overstate.

A program is

    min or max  c . x + constant
    s.t.        a_i . x  <=, >= or ==  b_i          rows, each with a name
                lower_j <= x_j <= upper_j,  some x_j whole
                boxes of one group do not overlap: [start, start + size) x [begin, end)

`solve` hands it to HiGHS, to CBC where HiGHS is absent or gives up, or, asked for by name, to
CP-SAT (`cp_sat.py`); HiGHS and CBC get boxes as the usual disjunction with a large constant. What
comes back is checked here, against the program as it was written:

    optimal      the point satisfies every row and bound, and gap <= `PROVEN_FRAC`
    feasible     the point satisfies them; a limit ended the search, the gap is what is proven
    infeasible   proven; `conflict` names rows, bounds and whole variables that cannot hold together
    unbounded    a feasible point exists, and the variables in `ray` improve it without end
    undecided    none of these was proven in the time, or no point passed the check; `reason` why

The bound is the engine's own, never better than proven: where it reports none, that of the linear
relaxation. Numbers are scaled by powers of two before an engine sees them, since engines compare
with absolute tolerances. Answers are deterministic as long as no time limit ends the search.

    gap = |objective - bound| / |objective|
    dual of row i = d objective / d b_i        reduced cost of j = d objective / d x_j  (LPs only)

Source: duals and irreducible conflicts as in Chinneck 2008, Feasibility and Infeasibility in
Optimization. Implemented in: `engines.run` (scaling, engines), `solve` (checks, fallback),
`conflicts.conflict_of`, `conflicts.ray_of`, `program_text` (print), `engines.exported` (files).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from simulator.planners.conflicts import Conflict

Floats: TypeAlias = NDArray[np.float64]

Sense: TypeAlias = Literal["min", "max"]

AT_MOST, AT_LEAST, EQUAL = "<=", ">=", "=="
RELATIONS: Final = (AT_MOST, AT_LEAST, EQUAL)
MINIMISE: Final[Sense] = "min"
MAXIMISE: Final[Sense] = "max"

OPTIMAL, FEASIBLE, INFEASIBLE, UNBOUNDED, UNDECIDED = (
    "optimal", "feasible", "infeasible", "unbounded", "undecided",
)  # fmt: skip
HIGHS, CBC, CP_SAT = "highs", "cbc", "cp-sat"
ENGINES: Final = (HIGHS, CBC, CP_SAT)

PROVEN_FRAC: Final = 1e-9
"""Gaps up to this are rounding: the answer counts as optimal."""
CHECK_FRAC: Final = 1e-6
"""Most a row may be missed by, over its largest term or its right side."""
FLOOR_SHARE: Final = 0.25
"""Time for the relaxation's bound after a limit, over the time limit."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One unknown; `whole`: integers only."""

    name: str
    lower: float = 0.0
    upper: float = math.inf
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """`terms` (coefficients by variable) related to `right`; the name says what it stands for."""

    name: str
    terms: Mapping[str, float]
    relation: str
    right: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """[x, x + size) over [begin, end), where x is the variable `start`."""

    start: str
    size: float
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """Variables, rows, an objective by variable, and boxes none of which may overlap another.

    >>> p = Program(
    ...     name="mix", sense=MAXIMISE, objective={"a": 3.0, "b": 2.0},
    ...     variables=(Variable("a"), Variable("b", upper=3.0, whole=True)),
    ...     rows=(Row("hours", {"a": 1.0, "b": 1.0}, AT_MOST, 4.5),),
    ... )
    >>> found = solve(p)
    >>> found.status, found.objective, found.values, found.gap_frac
    ('optimal', 13.5, {'a': 4.5, 'b': 0.0}, 0.0)
    """

    name: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]
    objective: Mapping[str, float]
    constant: float = 0.0
    sense: Sense = MINIMISE
    boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        known = self.index
        if len(known) != len(self.variables):
            raise InputError(f"{self.name}: two variables have one name; rename one")
        if len({row.name for row in self.rows}) != len(self.rows):
            raise InputError(f"{self.name}: two rows have one name; rename one")
        for row in self.rows:
            if row.relation not in RELATIONS:
                raise InputError(f"{row.name}: unknown relation '{row.relation}'; give <=, >=, ==")
            self._check(row.name, row.terms, (*row.terms.values(), row.right))
        self._check("the objective", self.objective, (*self.objective.values(), self.constant))
        for box in self.boxes:
            self._check("a box", (box.start,), (box.size, box.begin, box.end))
        for one in self.variables:
            if math.isnan(one.lower) or math.isnan(one.upper):
                raise InputError(f"{one.name}: a bound is not a number; give one or infinity")

    def _check(self, where: str, names: Iterable[str], numbers: Iterable[float]) -> None:
        for name in names:
            if name not in self.index:
                raise InputError(f"{where} of {self.name} uses the unknown variable {name}; add it")
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"{where} of {self.name} has a number that is not finite; mend it")

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each variable."""
        return {one.name: i for i, one in enumerate(self.variables)}

    @property
    def is_whole(self) -> bool:
        """Is any variable restricted to integers (boxes are a choice, too)?"""
        return bool(self.boxes) or any(one.whole for one in self.variables)

    def with_rows(self, *rows: Row) -> Program:
        """More rows."""
        return dataclasses.replace(self, rows=(*self.rows, *rows))

    def relaxed(self) -> Program:
        """The linear program that is left when every variable may be fractional."""
        variables = tuple(dataclasses.replace(one, whole=False) for one in self.variables)
        return dataclasses.replace(self, variables=variables)

    def fixed(self, values: Mapping[str, float]) -> Program:
        """The linear program with every whole variable at its value: what prices a plan."""
        variables = tuple(
            Variable(one.name, float(round(values[one.name])), float(round(values[one.name])))
            if one.whole
            else one
            for one in self.variables
        )
        return dataclasses.replace(self, variables=variables)

    @cached_property
    def linear(self) -> Program:
        """The same without boxes: z = 1 where the first of a pair lies below the second,

            x_i + size_i <= x_j + M (1 - z),    x_j + size_j <= x_i + M z

        for pairs that share time; M is what the variables' bounds allow.
        """
        if not self.boxes:
            return self
        variables, rows = list(self.variables), list(self.rows)
        for i, a in enumerate(self.boxes):
            for j, b in enumerate(self.boxes[:i]):
                if a.begin < b.end and b.begin < a.end and a.size > 0 and b.size > 0:
                    z = Variable(f"below[{i},{j}]", 0.0, 1.0, True)
                    variables.append(z)
                    rows += _apart(a, b, z.name, self._reach(a, b), self._reach(b, a))
        return dataclasses.replace(
            self, variables=tuple(variables), rows=tuple(rows), boxes=()
        )  # fmt: skip

    def _reach(self, a: Box, b: Box) -> float:
        """The most that `a` can end above the start of `b`."""
        first, second = (self.variables[self.index[box.start]] for box in (a, b))
        reach = first.upper + a.size - second.lower
        if not math.isfinite(reach):
            raise InputError(f"{self.name}: a box's start has no bounds; give it both")
        return reach


def _apart(a: Box, b: Box, z: str, reach_ab: float, reach_ba: float) -> tuple[Row, Row]:
    name = z.removeprefix("below")
    return (
        Row(f"first below{name}", {a.start: 1.0, b.start: -1.0, z: reach_ab}, AT_MOST,
            reach_ab - a.size),
        Row(f"second below{name}", {b.start: 1.0, a.start: -1.0, z: -reach_ba}, AT_MOST, -b.size),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What is known of a program; `objective` and `values` only where a point was found.

    `bound` lies on the far side of every feasible point's objective. `duals` and `reduced_costs`
    exist for linear programs solved to the end.
    """

    status: str
    engine: str
    solve_s: float
    reason: str = ""
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    objective: float = math.nan
    bound: float = math.nan
    duals: Mapping[str, float] | None = None
    reduced_costs: Mapping[str, float] | None = None
    conflict: Conflict | None = None
    ray: tuple[str, ...] = ()

    @property
    def has_point(self) -> bool:
        """Was a feasible point found?"""
        return self.status in (OPTIMAL, FEASIBLE)

    @property
    def gap_frac(self) -> float:
        """How far the objective may be from the best one; infinite where nothing is proven."""
        return gap_frac(self.objective, self.bound) if self.has_point else math.inf


def gap_frac(objective: float, bound: float) -> float:
    """|objective - bound| / |objective|.

    >>> gap_frac(10.0, 9.5), gap_frac(0.0, 0.0), gap_frac(0.0, -1.0)
    (0.05, 0.0, inf)
    """
    apart = abs(objective - bound)
    if apart == 0 or math.isnan(apart):
        return apart if apart == 0 else math.inf
    return apart / abs(objective) if objective else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an engine says, in the program's units; `solve` decides what of it holds.

    `claim` is a status word; `point` None without incumbent; `bound` NaN where none is reported.
    """

    claim: str
    reason: str = ""
    point: Floats | None = None
    bound: float = math.nan
    duals: Floats | None = None
    reduced_costs: Floats | None = None


def solve(
    program: Program,
    *,
    engine: str | None = None,
    time_limit_s: float = 60.0,
    gap_frac: float = 0.0,
    hint: Mapping[str, float] | None = None,
    explain: bool = True,
) -> Solution:
    """The best point of a program, and how much of that is proven.

    `engine` None: HiGHS, else CBC. The search ends at the relative gap `gap_frac`. `hint` is a
    point to start from (CP-SAT). Without `explain` no conflict or ray is looked for.
    """
    if engine is not None and engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES, f"give {', '.join(ENGINES)}")
    if not time_limit_s > 0 or not 0 <= gap_frac < math.inf:
        raise InputError("a solver needs a time limit above 0 s and a gap of at least 0")
    start = time.perf_counter()
    whole = program if engine == CP_SAT else program.linear
    found: Solution | None = None
    for name in () if _is_hopeless(program) else _candidates(engine):
        left_s = max(time_limit_s - (time.perf_counter() - start), 1e-3)
        found = _judged(whole, name, _ask(name, whole, left_s, gap_frac, hint), time_limit_s)
        if found.status != UNDECIDED or "limit" in found.reason:
            break
    found = found or Solution(status=INFEASIBLE, engine="none", solve_s=0.0)
    if explain and found.status in (INFEASIBLE, UNBOUNDED):
        found = _explained(program.linear, found, time_limit_s)
    return dataclasses.replace(
        found,
        solve_s=time.perf_counter() - start,
        values={one.name: found.values[one.name] for one in program.variables}
        if found.has_point
        else {},
    )


def _is_hopeless(program: Program) -> bool:
    """Bounds that cross, or a row without terms that is false: engines differ on these."""
    empty = [row for row in program.rows if not any(row.terms.values())]
    return any(one.lower > one.upper for one in program.variables) or any(
        not {AT_MOST: row.right >= 0, AT_LEAST: row.right <= 0, EQUAL: row.right == 0}[row.relation]
        for row in empty
    )


def _candidates(engine: str | None) -> tuple[str, ...]:
    """Engines to try in turn."""
    if engine is not None:
        return (engine,)
    from simulator.planners.engines import available

    return tuple(name for name in (HIGHS, CBC) if available(name))


def _ask(
    engine: str,
    program: Program,
    time_limit_s: float,
    gap: float,
    hint: Mapping[str, float] | None,
) -> Answer:
    if engine == CP_SAT:
        from simulator.planners import cp_sat

        return cp_sat.run(program, time_limit_s=time_limit_s, gap_frac=gap, hint=hint)
    from simulator.planners import engines

    return engines.run(program, engine, time_limit_s=time_limit_s, gap_frac=gap)


# ---- what of an answer holds -------------------------------------------------------------------


def _judged(program: Program, engine: str, answer: Answer, time_limit_s: float) -> Solution:
    """The answer, as far as it can be confirmed."""
    if answer.claim in (INFEASIBLE, UNBOUNDED):
        return _without_point(program, engine, answer, time_limit_s)
    if answer.point is None:
        bound = _floor(program, engine, answer.bound, time_limit_s)
        return Solution(
            status=UNDECIDED, engine=engine, solve_s=0.0, reason=answer.reason, bound=bound
        )
    point = _rounded(program, answer.point)
    missed = worst_miss(program, point)
    if missed is not None:
        refined = _refined(program, engine, point, time_limit_s)
        if refined is None:
            return Solution(
                status=UNDECIDED, engine=engine, solve_s=0.0,
                reason=f"{engine}'s point misses '{missed}'; rescale the program",
            )  # fmt: skip
        point = refined
    return _with_point(program, engine, answer, point, time_limit_s)


def _with_point(
    program: Program, engine: str, answer: Answer, point: Floats, time_limit_s: float
) -> Solution:
    objective = objective_of(program, point)
    bound = objective if answer.claim == OPTIMAL and math.isnan(answer.bound) else answer.bound
    bound = _no_better(program, objective, _floor(program, engine, bound, time_limit_s))
    proven = gap_frac(objective, bound) <= PROVEN_FRAC or (
        answer.claim == OPTIMAL and abs(objective - bound) <= PROVEN_FRAC * _size(program, point)
    )
    names = [one.name for one in program.variables]
    is_priced = proven and not program.is_whole and answer.duals is not None
    return Solution(
        status=OPTIMAL if proven else FEASIBLE,
        engine=engine,
        solve_s=0.0,
        reason="" if proven else answer.reason or "the gap asked for was reached",
        values=dict(zip(names, point.tolist(), strict=True)),
        objective=objective,
        bound=objective if proven else bound,
        duals=_named(program.rows, answer.duals) if is_priced else None,
        reduced_costs=_named(program.variables, answer.reduced_costs) if is_priced else None,
    )


def _named(things: Iterable[Row | Variable], values: Floats | None) -> dict[str, float]:
    assert values is not None
    return {one.name: value for one, value in zip(things, values.tolist(), strict=True)}


def _without_point(
    program: Program, engine: str, answer: Answer, time_limit_s: float
) -> Solution:  # fmt: skip
    """Infeasible or unbounded: engines mix the two up, a program without objective tells."""
    blank = dataclasses.replace(program, objective={}, constant=0.0)
    second = _ask(engine, blank, time_limit_s, 0.0, None)
    feasible = second.point is not None and worst_miss(blank, _rounded(blank, second.point)) is None
    if second.claim == INFEASIBLE and answer.claim == INFEASIBLE:
        return Solution(status=INFEASIBLE, engine=engine, solve_s=0.0)
    if feasible and _ray(program, time_limit_s):
        return Solution(
            status=UNBOUNDED, engine=engine, solve_s=0.0,
            objective=-math.inf if program.sense == MINIMISE else math.inf,
        )  # fmt: skip
    return Solution(
        status=INFEASIBLE if second.claim == INFEASIBLE else UNDECIDED, engine=engine, solve_s=0.0,
        reason="" if second.claim == INFEASIBLE else f"{engine} called it {answer.claim}; "
        "a check did not agree",
    )  # fmt: skip


def _ray(program: Program, time_limit_s: float) -> tuple[str, ...]:
    from simulator.planners.conflicts import ray_of

    return ray_of(program, time_limit_s=time_limit_s)


def _explained(program: Program, found: Solution, time_limit_s: float) -> Solution:
    if found.status == UNBOUNDED:
        return dataclasses.replace(found, ray=_ray(program, time_limit_s))
    from simulator.planners.conflicts import conflict_of

    conflict = conflict_of(program, time_limit_s=time_limit_s)
    return dataclasses.replace(found, conflict=conflict)


def _rounded(program: Program, point: Floats) -> Floats:
    """Whole variables to integers, all within their bounds."""
    whole = np.array([one.whole for one in program.variables], dtype=bool)
    lower = np.array([one.lower for one in program.variables])
    upper = np.array([one.upper for one in program.variables])
    rounded = np.where(whole, np.round(point), point)
    slack = CHECK_FRAC * np.maximum(1.0, np.abs(point))
    near = np.clip(rounded, lower, upper)  # engines may stray by their tolerance
    return np.where(np.abs(near - rounded) <= slack, near, rounded) + 0.0


def worst_miss(program: Program, point: Floats) -> str | None:
    """The name of a row or variable that a point misses beyond `CHECK_FRAC`, if any."""
    if not np.all(np.isfinite(point)):
        return "a value is not finite"
    index = program.index
    worst, name = CHECK_FRAC, None
    for row in program.rows:
        terms = [value * point[index[one]] for one, value in row.terms.items()]
        size = max(map(abs, [*terms, row.right]), default=0.0)
        over = math.fsum([*terms, -row.right])
        miss = {AT_MOST: over, AT_LEAST: -over, EQUAL: abs(over)}[row.relation]
        if size and miss / size > worst:
            worst, name = miss / size, row.name
    for one, value in zip(program.variables, point, strict=True):
        if value < one.lower or value > one.upper:
            return f"bounds of {one.name}"
    return name or _overlap(program, point)


def _overlap(program: Program, point: Floats) -> str | None:
    """Two boxes that share an area, by the names of their variables."""
    for i, a in enumerate(program.boxes):
        for b in program.boxes[:i]:
            low, high = (point[program.index[box.start]] for box in (a, b))
            if a.begin < b.end and b.begin < a.end and low < high + b.size and high < low + a.size:
                return f"{a.start} beside {b.start}"
    return None


def objective_of(program: Program, point: Floats) -> float:
    """The objective at a point, summed exactly."""
    return math.fsum(
        [*(c * point[program.index[name]] for name, c in program.objective.items()),
         program.constant]
    )  # fmt: skip


def _size(program: Program, point: Floats) -> float:
    """Largest term of the objective at a point: what its rounding is measured against."""
    terms = (abs(c * float(point[program.index[name]])) for name, c in program.objective.items())
    return max([abs(program.constant), *terms])


def _no_better(program: Program, objective: float, bound: float) -> float:
    """A bound beyond the point that was found is rounding; the point itself is the bound then."""
    return min(bound, objective) if program.sense == MINIMISE else max(bound, objective)


def _floor(program: Program, engine: str, bound: float, time_limit_s: float) -> float:
    """The bound, or that of the linear relaxation where the engine has none."""
    nothing = -math.inf if program.sense == MINIMISE else math.inf
    if math.isfinite(bound):
        return bound
    if engine == CP_SAT or not program.is_whole:
        return nothing
    limit = FLOOR_SHARE * time_limit_s
    relaxed = _ask(engine, program.relaxed(), limit, 0.0, None)
    if relaxed.claim != OPTIMAL or relaxed.point is None:
        return nothing
    return objective_of(program, relaxed.point)


def _refined(
    program: Program, engine: str, point: Floats, time_limit_s: float
) -> Floats | None:  # fmt: skip
    """The continuous variables solved again with the whole ones at their integers."""
    if engine == CP_SAT or not program.is_whole:
        return None
    values = {one.name: float(v) for one, v in zip(program.variables, point, strict=True)}
    again = _ask(engine, program.fixed(values), FLOOR_SHARE * time_limit_s, 0.0, None)
    if again.point is None:
        return None
    refined = _rounded(program, again.point)
    return refined if worst_miss(program, refined) is None else None

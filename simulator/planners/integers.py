"""Integer constraint programs: few variables with finite domains, solved exhaustively or as a MILP.

A program is an ordered set of variables x_v in D_v and named constraints over products of them

    left(x) == right(x),   left(x) <= right(x),   right(x) divides left(x)

`solve` joins the domains variable by variable and drops every combination as soon as a constraint
knows all its variables: what remains is every solution, and nothing remaining is a proof that there
is none. `binding` names the constraints without which there would be one. `solve_milp` gives the
same question to a solver: a choice y_(v,d) in {0, 1} for every value and z_(S,c) >= 0 for every
combination c of the variables S of a constraint that this constraint allows:

    sum_d y_(v,d) = 1,     sum_(c in S: c_v = d) z_(S,c) = y_(v,d)

Source: the grammar of ConstrINT (arXiv 2412.07752, section 4; flashrnn/autotune/constrint.py of
NX-AI/flashrnn), which propagates ranges and divisors instead and may leave a question open.

    Implemented in: `solve`, `binding`, `milp_of`, `solve_milp`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError
from simulator.planners import program as seam

Ints: TypeAlias = NDArray[np.int64]
Table: TypeAlias = dict[str, Ints]
"""A column for each variable, a row for each combination."""
Side: TypeAlias = Callable[[Mapping[str, Ints]], Any]

EQUAL, AT_MOST, DIVIDES = "==", "<=", "%"
LARGEST, SMALLEST = -1, 1
"""Which value of a variable is taken first."""
CHUNK_ROWS: Final = 2**20
"""Combinations looked at together."""
MOST_ROWS: Final = 2**23
"""Combinations kept: beyond, a program is not one of these small ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """`left` relation `right` over the variables in `uses`; '%': right divides left.

    `name` says what it stands for ('shared memory'); `resource` marks what hardware limits, against
    what only divides sizes into whole tiles.
    """

    name: str
    uses: tuple[str, ...]
    left: Side
    right: Side
    relation: str = AT_MOST
    resource: bool = False

    def holds(self, table: Mapping[str, Ints]) -> NDArray[np.bool_]:
        """Which rows satisfy it."""
        left, right = self.left(table), self.right(table)
        if self.relation == EQUAL:
            found = np.equal(left, right)
        elif self.relation == AT_MOST:
            found = np.less_equal(left, right)
        else:
            found = np.equal(np.mod(left, right), 0)
        return np.broadcast_to(found, _rows(table))


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Domains in the order they are joined, with the value that is preferred of each."""

    domains: Mapping[str, Sequence[int]]
    constraints: tuple[Constraint, ...]
    prefer: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for constraint in self.constraints:
            for name in constraint.uses:
                if name not in self.domains:
                    raise ValueError(f"{constraint.name} uses the unknown variable {name}")

    def without(self, *names: str) -> Program:
        """The program without those constraints."""
        kept = tuple(c for c in self.constraints if c.name not in names)
        return dataclasses.replace(self, constraints=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All solutions of a program, the preferred one first; no rows: proven infeasible."""

    table: Table

    @property
    def feasible(self) -> bool:
        """Is there a solution?"""
        return self.num_solutions > 0

    @property
    def num_solutions(self) -> int:
        """How many there are."""
        return _rows(self.table)

    def first(self) -> dict[str, int]:
        """The preferred solution."""
        return {name: int(column[0]) for name, column in self.table.items()}

    def rows(self) -> Iterator[dict[str, int]]:
        """All solutions, the preferred one first."""
        for row in zip(*self.table.values(), strict=True):
            yield dict(zip(self.table, map(int, row), strict=True))


def solve(program: Program) -> Answer:
    """Every solution.

    >>> rule = Constraint(name="area", uses=("a", "b"), relation=EQUAL,
    ...                   left=lambda v: v["a"] * v["b"], right=lambda v: 12)
    >>> p = Program(domains={"a": range(1, 5), "b": range(1, 5)}, constraints=(rule,))
    >>> solve(p).num_solutions, solve(p).first()
    (2, {'a': 3, 'b': 4})
    """
    table: Table = {}
    waiting = list(program.constraints)
    for name, domain in program.domains.items():
        ready = [c for c in waiting if {*c.uses} <= {*table, name}]
        waiting = [c for c in waiting if c not in ready]
        table = _joined(table, name, np.asarray(domain, dtype=np.int64), ready)
    return Answer(table=_ordered(table, program))


def binding(program: Program) -> tuple[str, ...]:
    """Constraints of an infeasible program without which, one at a time, it has a solution.

    Hardware limits first; where no single one is to blame, a set that conflicts and of which each
    is needed for that (Chinneck 1997's deletion filter).
    """
    alone = [c for c in program.constraints if solve(program.without(c.name)).feasible]
    if alone:
        return tuple(c.name for c in sorted(alone, key=lambda c: not c.resource))
    rest = program
    for constraint in sorted(program.constraints, key=lambda c: c.resource):
        smaller = rest.without(constraint.name)
        if not solve(smaller).feasible:
            rest = smaller
    return tuple(c.name for c in sorted(rest.constraints, key=lambda c: not c.resource))


def _rows(table: Mapping[str, Ints]) -> int:
    return len(next(iter(table.values()))) if table else 0


def _joined(table: Table, name: str, domain: Ints, ready: Sequence[Constraint]) -> Table:
    """The table with one more column, its rows filtered."""
    if not table:
        return _filtered({name: domain}, ready)
    step = max(CHUNK_ROWS // max(len(domain), 1), 1)
    parts = []
    for start in range(0, _rows(table), step):
        part = {key: column[start : start + step] for key, column in table.items()}
        whole = {key: np.repeat(column, len(domain)) for key, column in part.items()}
        whole[name] = np.tile(domain, _rows(part))
        parts.append(_filtered(whole, ready))
    if sum(_rows(part) for part in parts) > MOST_ROWS:
        raise InputError(
            f"an integer program of more than {MOST_ROWS} partial solutions at '{name}'; "
            "fix a variable or put constrained variables first"
        )
    names = (*table, name)
    empty = np.empty(0, dtype=np.int64)
    return {key: np.concatenate([empty, *(part[key] for part in parts)]) for key in names}


def _filtered(table: Table, ready: Sequence[Constraint]) -> Table:
    for constraint in ready:
        keep = constraint.holds(table)
        table = {name: column[keep] for name, column in table.items()}
    return table


def _ordered(table: Table, program: Program) -> Table:
    """Rows by preference: the first named variable counts most."""
    if not program.prefer or not _rows(table):
        return table
    keys = [sign * table[name] for name, sign in program.prefer.items()]
    order = np.lexsort(tuple(reversed(keys)))
    return {name: column[order] for name, column in table.items()}


# ---- the same as a mixed-integer program -------------------------------------------------------


def solve_milp(program: Program, *, time_limit_s: float = 60.0) -> dict[str, int] | None:
    """One solution by the solver seam (`planners.program`), None where it proves there is none.

    Constraints may use few variables only: all combinations they allow are columns.
    """
    built = milp_of(program)
    if built is None:
        return None
    question, choices = built
    found = seam.solve(question, time_limit_s=time_limit_s, explain=False)
    if found.status == seam.INFEASIBLE:
        return None
    if not found.has_point:
        raise InputError(f"no solution and no proof ({found.reason}); raise time_limit_s")
    return {name: value for (name, value), y in choices.items() if found.values[y] > 0.5}


def milp_of(program: Program) -> tuple[seam.Program, dict[tuple[str, int], str]] | None:
    """The rows of `solve_milp`, and the names of y; None where a constraint allows nothing."""
    domains = _narrowed(program)
    if not all(domains.values()):
        return None
    choices = {(n, v): f"y[{n},{v}]" for n, domain in domains.items() for v in domain}
    variables = [seam.Variable(y, upper=1.0, whole=True) for y in choices.values()]
    rows = [
        seam.Row(f"one {name}", {choices[name, v]: 1.0 for v in domain}, seam.EQUAL, 1.0)
        for name, domain in domains.items()
    ]
    for number, constraint in enumerate(program.constraints):
        table = _allowed(constraint, domains)
        columns = [f"z[{number},{i}]" for i in range(_rows(table))]
        if not columns:
            return None
        variables += [seam.Variable(z, upper=1.0) for z in columns]
        rows += _ties(f"{number} {constraint.name}", table, columns, domains, choices)
    return seam.Program(
        name="integer constraints", variables=tuple(variables), rows=tuple(rows), objective={}
    ), choices


def _allowed(constraint: Constraint, domains: Mapping[str, Sequence[int]]) -> Table:
    """The combinations of its variables that a constraint allows."""
    table: Table = {}
    for name in dict.fromkeys(constraint.uses):
        table = _joined(table, name, np.asarray(domains[name], dtype=np.int64), ())
    return _filtered(table, [constraint])


def _ties(
    label: str, table: Table, columns: Sequence[str], domains: Mapping[str, Sequence[int]],
    choices: Mapping[tuple[str, int], str],
) -> Iterator[seam.Row]:  # fmt: skip
    """sum of z over the combinations with a value = y of that value."""
    for name, column in table.items():
        for value in domains[name]:
            terms = {columns[i]: 1.0 for i in np.flatnonzero(column == value).tolist()}
            terms[choices[name, value]] = -1.0
            yield seam.Row(f"{label}: {name} = {value}", terms, seam.EQUAL, 0.0)


def _narrowed(program: Program) -> dict[str, list[int]]:
    """Domains that the constraints on single variables leave."""
    found = {}
    for name, domain in program.domains.items():
        alone = [c for c in program.constraints if set(c.uses) == {name}]
        table = _filtered({name: np.asarray(domain, dtype=np.int64)}, alone)
        found[name] = [int(value) for value in table[name]]
    return found

"""Integer constraint programs: every solution, proven infeasibility, blame, HiGHS' agreement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError
from simulator.planners import integers
from simulator.planners.integers import (
    AT_MOST,
    DIVIDES,
    EQUAL,
    LARGEST,
    SMALLEST,
    Constraint,
    Program,
    binding,
    solve,
    solve_milp,
)

NAMES = ("a", "b", "c")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Three variables, some products of two against a number or the third."""
    domains = {
        name: tuple(sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=5))))
        for name in NAMES
    }
    constraints = []
    for i in range(draw(st.integers(1, 4))):
        p, q, r = draw(st.permutations(NAMES))
        factor = draw(st.integers(1, 6))
        constraints.append(
            Constraint(
                name=f"rule {i}", uses=(p, q, r),
                relation=draw(st.sampled_from((EQUAL, AT_MOST, DIVIDES))),
                left=lambda v, p=p, q=q: v[p] * v[q],
                right=lambda v, r=r, f=factor: f * v[r],
                resource=draw(st.booleans()),
            )
        )  # fmt: skip
    return Program(domains=domains, constraints=tuple(constraints))


def brute_force(program: Program) -> set[tuple[int, ...]]:
    """Every combination tried with plain numbers."""
    found = set()
    for values in itertools.product(*program.domains.values()):
        row = {n: np.array([v]) for n, v in zip(program.domains, values, strict=True)}
        if all(bool(c.holds(row)[0]) for c in program.constraints):
            found.add(values)
    return found


@settings(max_examples=200, deadline=None)
@given(program=programs(), chunk=st.sampled_from((1, 7, 2**20)))
def test_every_solution_and_no_other(program: Program, chunk: int) -> None:
    kept, integers.CHUNK_ROWS = integers.CHUNK_ROWS, chunk  # type: ignore[misc]
    try:
        found = {tuple(row.values()) for row in solve(program).rows()}
    finally:
        integers.CHUNK_ROWS = kept  # type: ignore[misc]
    assert found == brute_force(program)


@settings(max_examples=25, deadline=None)
@given(program=programs())
def test_highs_agrees(program: Program) -> None:
    chosen = solve_milp(program)
    solutions = brute_force(program)
    if chosen is None:
        assert not solutions
    else:
        assert tuple(chosen[name] for name in program.domains) in solutions


@settings(max_examples=100, deadline=None)
@given(program=programs())
def test_what_binds_is_to_blame(program: Program) -> None:
    if solve(program).feasible:
        return
    names = binding(program)
    assert names
    alone = [solve(program.without(name)).feasible for name in names]
    # each relaxes the program alone, or together they conflict and no part of them does
    if not all(alone):
        core = Program(
            domains=program.domains,
            constraints=tuple(c for c in program.constraints if c.name in names),
        )
        assert not solve(core).feasible
        assert all(solve(core.without(name)).feasible for name in names)


def rule(relation: str, limit: int, name: str = "product") -> Constraint:
    return Constraint(
        name=name, uses=("a", "b"), relation=relation, left=lambda v: v["a"] * v["b"],
        right=lambda v: limit,
    )  # fmt: skip


def test_preferences_order_the_solutions() -> None:
    program = Program(
        domains={"a": range(1, 13), "b": range(1, 13)}, constraints=(rule(EQUAL, 12),),
        prefer={"b": SMALLEST, "a": LARGEST},
    )  # fmt: skip
    assert [row["b"] for row in solve(program).rows()] == [1, 2, 3, 4, 6, 12]
    assert solve(program).first() == {"a": 12, "b": 1}


def test_a_misspelt_variable_is_a_defect() -> None:
    with pytest.raises(ValueError, match="unknown variable b"):
        Program(domains={"a": (1,)}, constraints=(rule(EQUAL, 1),))


def test_a_program_that_grows_beyond_reach_is_refused() -> None:
    program = Program(domains={"a": range(1, 4000), "b": range(1, 4000)}, constraints=())
    with pytest.raises(InputError, match="more than"):
        solve(program)

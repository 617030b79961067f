"""The solver seam: statuses that hold, bounds that bound, prices, conflicts, files."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import highspy
import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError, UnknownNameError
from simulator.planners import engines
from simulator.planners import program as seam
from simulator.planners.conflicts import conflict_of
from simulator.planners.program import (
    AT_LEAST,
    AT_MOST,
    CBC,
    EQUAL,
    FEASIBLE,
    HIGHS,
    INFEASIBLE,
    MAXIMISE,
    MINIMISE,
    OPTIMAL,
    UNBOUNDED,
    UNDECIDED,
    Answer,
    Box,
    Program,
    Row,
    Solution,
    Variable,
    gap_frac,
    solve,
)
from simulator.planners.program_text import text

BOTH = pytest.mark.parametrize("engine", [HIGHS, CBC])


def program(
    objective: dict[str, float],
    variables: list[Variable],
    rows: list[Row],
    *,
    sense: seam.Sense = MINIMISE,
    constant: float = 0.0,
    boxes: tuple[Box, ...] = (),
) -> Program:
    return Program(
        name="test", objective=objective, variables=tuple(variables), rows=tuple(rows),
        sense=sense, constant=constant, boxes=boxes,
    )  # fmt: skip


def mix(whole: bool = False) -> Program:
    """Two products in two machines' hours: 36 at (2, 6), from any textbook."""
    return program(
        {"doors": 3.0, "windows": 5.0},
        [Variable("doors", whole=whole), Variable("windows", whole=whole)],
        [
            Row("plant 1", {"doors": 1.0}, AT_MOST, 4.0),
            Row("plant 2", {"windows": 2.0}, AT_MOST, 12.0),
            Row("plant 3", {"doors": 3.0, "windows": 2.0}, AT_MOST, 18.0),
        ],
        sense=MAXIMISE,
    )


def market_split(num: int = 40, rows: int = 5, seed: int = 1) -> Program:
    """Hard for every branch and bound (Cornuejols and Dawande 1998): the bound stays at 0."""
    rng = np.random.default_rng(seed)
    variables = [Variable(f"x{i}", 0, 1, True) for i in range(num)]
    made, objective = [], {}
    for k in range(rows):
        weights = rng.integers(0, 100, num)
        terms = {f"x{i}": float(w) for i, w in enumerate(weights)}
        terms |= {f"over{k}": -1.0, f"under{k}": 1.0}
        variables += [Variable(f"over{k}"), Variable(f"under{k}")]
        objective |= {f"over{k}": 1.0, f"under{k}": 1.0}
        made.append(Row(f"split {k}", terms, EQUAL, float(weights.sum() // 2)))
    return program(objective, variables, made)


# ---- answers -----------------------------------------------------------------------------------


@BOTH
def test_a_textbook_program_with_its_prices(engine: str) -> None:
    found = solve(mix(), engine=engine)
    assert (found.status, found.engine) == (OPTIMAL, engine)
    assert found.objective == pytest.approx(36, rel=1e-12)
    assert found.bound == found.objective and found.gap_frac == 0
    assert found.values == pytest.approx({"doors": 2.0, "windows": 6.0})
    assert found.duals == pytest.approx({"plant 1": 0.0, "plant 2": 1.5, "plant 3": 1.0})
    assert found.reduced_costs == pytest.approx({"doors": 0.0, "windows": 0.0}, abs=1e-9)


@BOTH
@pytest.mark.parametrize("sense", [MINIMISE, MAXIMISE])
def test_duals_are_finite_differences(engine: str, sense: seam.Sense) -> None:
    sign = -1.0 if sense == MAXIMISE else 1.0
    base = program(
        {"x": sign * 2e-6, "y": sign * 3e-6, "idle": sign * 7e-6},
        [Variable("x", 0, 4), Variable("y"), Variable("idle")],
        [
            Row("need", {"x": 1e9, "y": 1e9, "idle": 1e9}, AT_LEAST, 1e10),
            Row("share", {"y": 1.0, "x": -2.0}, EQUAL, 0.5),
        ],
        sense=sense,
    )
    found = solve(base, engine=engine)
    assert found.status == OPTIMAL and found.duals is not None
    for at, row in enumerate(base.rows):
        step = 1e-2 * max(abs(row.right), 1.0)
        moved = [*base.rows]
        moved[at] = dataclasses.replace(row, right=row.right + step)
        other = solve(dataclasses.replace(base, rows=tuple(moved)), engine=engine)
        difference = (other.objective - found.objective) / step
        assert found.duals[row.name] == pytest.approx(difference, rel=1e-4)  # CBC's digits
    assert found.reduced_costs is not None
    forced = (*base.variables[:2], Variable("idle", 0.1))
    other = solve(dataclasses.replace(base, variables=forced), engine=engine)
    difference = (other.objective - found.objective) / 0.1
    assert found.reduced_costs["idle"] == pytest.approx(difference, rel=1e-4)


@BOTH
def test_mixed_programs_have_no_duals_until_fixed(engine: str) -> None:
    found = solve(mix(whole=True), engine=engine)
    assert found.duals is None and found.reduced_costs is None
    priced = solve(mix(whole=True).fixed(found.values), engine=engine)
    assert priced.duals is not None and priced.objective == pytest.approx(found.objective)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-9, 9), min_size=3, max_size=3),
    st.lists(st.tuples(st.lists(st.integers(-5, 5), min_size=3, max_size=3),
                       st.sampled_from([AT_MOST, AT_LEAST, EQUAL]), st.integers(-12, 12)),
             min_size=1, max_size=3),
    st.sampled_from([MINIMISE, MAXIMISE]),
)  # fmt: skip
def test_brute_force_agrees(
    costs: list[int], rows: list[tuple[list[int], str, int]], sense: seam.Sense
) -> None:
    names = "abc"
    question = program(
        dict(zip(names, map(float, costs), strict=True)),
        [Variable(name, -2, 3, True) for name in names],
        [Row(f"row {i}", dict(zip(names, map(float, left), strict=True)), relation, float(right))
         for i, (left, relation, right) in enumerate(rows)],
        sense=sense,
    )  # fmt: skip
    points = np.array(list(itertools.product(range(-2, 4), repeat=3)))
    holds = np.ones(len(points), dtype=bool)
    for left, relation, right in rows:
        value = points @ np.array(left)
        holds &= {AT_MOST: value <= right, AT_LEAST: value >= right, EQUAL: value == right}[
            relation
        ]
    found = solve(question)
    if not holds.any():
        assert found.status == INFEASIBLE
        return
    values = points[holds] @ np.array(costs)
    best = values.max() if sense == MAXIMISE else values.min()
    assert found.status == OPTIMAL
    assert found.objective == pytest.approx(best, abs=1e-9)


# ---- statuses that hold ------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("sense", [MINIMISE, MAXIMISE])
def test_an_incumbent_at_the_time_limit_is_feasible(engine: str, sense: seam.Sense) -> None:
    hard = market_split()
    if sense == MAXIMISE:
        negative = {name: -value for name, value in hard.objective.items()}
        hard = dataclasses.replace(hard, objective=negative, sense=sense)
    found = solve(hard, engine=engine, time_limit_s=0.4)
    assert found.status == FEASIBLE and "limit" in found.reason
    assert found.solve_s < 3
    # 0 bounds it: no split is better than even, and none of these is even.
    best = 0.0 if sense == MINIMISE else -0.0
    assert abs(found.objective) >= 1 and found.bound == pytest.approx(best, abs=1e-3)
    assert found.gap_frac == pytest.approx(1.0, abs=1e-3)


@BOTH
def test_nothing_found_in_the_time_is_undecided(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Answer(claim=UNDECIDED, reason=engines.TIME_LIMIT)
    ask = engines.run
    monkeypatch.setattr(engines, "run", lambda p, *a, **k: told if p.is_whole else ask(p, *a, **k))
    found = solve(mix(whole=True), engine=engine)
    assert found.status == UNDECIDED and not found.has_point and found.values == {}
    assert found.gap_frac == math.inf
    assert found.bound == pytest.approx(36)  # the relaxation's


@BOTH
def test_pulp_itself_calls_the_incumbent_optimal(engine: str) -> None:
    """The trap that this seam is for; if PuLP mends it, this test says so."""
    scaled = engines._Scaled.of(market_split())
    solver = pulp.HiGHS(msg=False, timeLimit=0.3) if engine == HIGHS else engines._cbc(timeLimit=1)
    scaled.problem.solve(solver)
    assert pulp.LpStatus[scaled.problem.status] == "Optimal"


@BOTH
def test_a_gap_that_was_asked_for_is_no_optimum(engine: str) -> None:
    # 36 items, no density alike: the root's bound is off, the first incumbents are within 5 %.
    rng = np.random.default_rng(3)
    weight, worth = rng.integers(20, 99, 36), rng.integers(20, 99, 36)
    names = [f"x{i}" for i in range(36)]
    sack = program(
        dict(zip(names, map(float, worth), strict=True)),
        [Variable(name, 0, 1, True) for name in names],
        [Row("room", dict(zip(names, map(float, weight), strict=True)), AT_MOST, 700.0)],
        sense=MAXIMISE,
    )
    exact = solve(sack, engine=engine)
    assert exact.status == OPTIMAL and exact.gap_frac == 0
    rough = solve(sack, engine=engine, gap_frac=0.2)
    assert rough.status in (OPTIMAL, FEASIBLE)
    assert rough.objective <= exact.objective <= rough.bound * (1 + 1e-12)
    assert rough.gap_frac <= 0.2
    assert (rough.status == OPTIMAL) == (rough.gap_frac <= seam.PROVEN_FRAC)


def test_a_bound_that_is_not_met_is_reported() -> None:
    told = Answer(claim=OPTIMAL, point=np.array([4.0, 3.0]), bound=30.0)
    found = seam._judged(mix(whole=True), HIGHS, told, 1.0)
    assert (found.status, found.objective, found.bound) == (FEASIBLE, 27.0, 30.0)
    assert found.gap_frac == pytest.approx(1 / 9)


def test_a_missing_bound_is_that_of_the_relaxation() -> None:
    told = Answer(claim=FEASIBLE, point=np.array([4.0, 3.0]), bound=-math.inf)
    found = seam._judged(mix(whole=True), HIGHS, told, 1.0)
    assert (found.status, found.bound) == (FEASIBLE, pytest.approx(36.0))


def test_a_wrong_point_is_refused() -> None:
    told = Answer(claim=OPTIMAL, point=np.array([4.0, 6.0]), bound=42.0)
    found = seam._judged(mix(), HIGHS, told, 1.0)
    assert found.status == UNDECIDED and "plant 3" in found.reason
    assert not found.has_point


@BOTH
def test_infeasible_programs_name_an_irreducible_conflict(engine: str) -> None:
    question = mix().with_rows(
        Row("order", {"doors": 1.0, "windows": 1.0}, AT_LEAST, 9.0),
        Row("idle", {"doors": 1.0}, AT_MOST, 50.0),
    )
    found = solve(question, engine=engine)
    assert found.status == INFEASIBLE and not found.has_point
    conflict = found.conflict
    assert conflict is not None and conflict.irreducible
    assert set(conflict.rows) == {"plant 2", "plant 3", "order"}
    assert conflict.bounds == ()
    for name in conflict.rows:
        rest = tuple(row for row in question.rows if row.name in conflict.rows and row.name != name)
        assert solve(dataclasses.replace(question, rows=rest), explain=False).status != INFEASIBLE


@BOTH
def test_conflicts_of_bounds_and_of_whole_numbers(engine: str) -> None:
    capped = program({}, [Variable("x", 0, 2)], [Row("need", {"x": 1.0}, AT_LEAST, 3.0)])
    found = solve(capped, engine=engine)
    assert str(found.conflict) == "need, x <= 2"
    odd = program({}, [Variable("n", 0, 9, True), Variable("m", 0, 9, True)],
                  [Row("odd", {"n": 2.0, "m": -2.0}, EQUAL, 1.0)])  # fmt: skip
    found = solve(odd, engine=engine)
    assert found.status == INFEASIBLE
    assert str(found.conflict) == "odd, n whole, m whole"
    crossed = program({"x": 1.0}, [Variable("x", 2, 1)], [])
    assert str(solve(crossed, engine=engine).conflict) == "x >= 2, x <= 1"


def test_a_conflict_without_time_is_not_claimed_irreducible() -> None:
    question = mix().with_rows(Row("order", {"doors": 1.0}, AT_LEAST, 9.0))
    assert conflict_of(question, time_limit_s=1e-9) is None


@BOTH
@pytest.mark.parametrize("whole", [False, True])
def test_unbounded_programs_name_the_direction(engine: str, whole: bool) -> None:
    question = program(
        {"x": -1e-7, "z": 1.0},
        [Variable("x", whole=whole), Variable("y"), Variable("z", 0, 5)],
        [Row("tied", {"x": 1.0, "y": -1.0}, AT_MOST, 1.0)],
    )
    found = solve(question, engine=engine)
    assert (found.status, found.ray) == (UNBOUNDED, ("x", "y"))
    assert found.objective == -math.inf and found.gap_frac == math.inf and not found.values


@BOTH
def test_infeasible_is_not_called_unbounded_nor_the_other_way(engine: str) -> None:
    both = program({"x": -1.0}, [Variable("x"), Variable("y", 0, 1)],
                   [Row("never", {"y": 1.0}, AT_LEAST, 2.0)])  # fmt: skip
    assert solve(both, engine=engine).status == INFEASIBLE


# ---- numerically nasty -------------------------------------------------------------------------


@BOTH
def test_tiny_numbers_are_not_lost_in_tolerances(engine: str) -> None:
    question = program(
        {"x": 1e-12, "y": 2e-12}, [Variable("x"), Variable("y")],
        [Row("need", {"x": 1e-9, "y": 1e-9}, AT_LEAST, 3e-6), Row("cap", {"x": 1.0}, AT_MOST, 1e3)],
    )  # fmt: skip
    found = solve(question, engine=engine)
    assert found.status == OPTIMAL
    assert found.objective == pytest.approx(5e-9, rel=1e-9)
    assert found.duals == pytest.approx({"need": 2e-3, "cap": -1e-12}, rel=1e-6)


@BOTH
def test_microseconds_beside_gigabytes(engine: str) -> None:
    question = program(
        {"seconds": 1.0},
        [Variable("seconds"), Variable("n", 0, 10, True), Variable("bytes")],
        [
            Row("time", {"seconds": 1.0, "n": 3e-6}, AT_LEAST, 3.1e-5),
            Row("memory", {"bytes": 1.0, "n": -8e9}, EQUAL, 0.0),
            Row("room", {"bytes": 1.0}, AT_MOST, 4.1e10),
        ],
    )
    found = solve(question, engine=engine)
    assert found.status == OPTIMAL
    assert found.values["n"] == 5
    assert found.objective == pytest.approx(1.6e-5, rel=1e-9)


@BOTH
def test_a_switch_that_leaks_is_never_called_optimal_at_zero(engine: str) -> None:
    """x <= 1e9 z with z "whole" at 1e-9 passes the engines' tolerances; it does not pass here."""
    question = program(
        {"z": 1.0}, [Variable("x"), Variable("z", 0, 1, True)],
        [Row("on", {"x": 1.0, "z": -1e9}, AT_MOST, 0.0), Row("need", {"x": 1.0}, AT_LEAST, 1.0)],
    )  # fmt: skip
    found = solve(question, engine=engine)
    assert found.status == UNDECIDED or (found.status == OPTIMAL and found.objective == 1.0)
    assert solve(question).objective == 1.0


@BOTH
def test_trivial_programs(engine: str) -> None:
    empty = program({}, [Variable("x", 2, 3)], [])
    found = solve(empty, engine=engine)
    assert (found.status, found.objective, found.values["x"]) == (OPTIMAL, 0.0, 2.0)
    fixed = program({"x": 2.0}, [Variable("x", 3, 3), Variable("idle", -4, -2)], [], constant=5.0)
    found = solve(fixed, engine=engine)
    assert (found.objective, found.bound, found.values["idle"]) == (11.0, 11.0, -2.0)
    wrong = program({"x": 1.0}, [Variable("x")], [Row("never", {}, AT_LEAST, 1.0)])
    assert solve(wrong, engine=engine).status == INFEASIBLE


def test_the_same_question_has_the_same_answer() -> None:
    hard = market_split(num=16, rows=2)
    for engine in (HIGHS, CBC):
        first, second = (solve(hard, engine=engine, time_limit_s=30) for _ in range(2))
        assert first.status == OPTIMAL
        assert (first.values, first.objective) == (second.values, second.objective)


def test_cbc_steps_in_where_highs_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    have = engines.available
    monkeypatch.setattr(engines, "available", lambda name: name != HIGHS and have(name))
    assert solve(mix()).engine == CBC
    with pytest.raises(InputError, match="not installed"):
        solve(mix(), engine=HIGHS)


def test_cbc_steps_in_where_highs_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engines, "_run_highs", lambda *_: Answer(claim=UNDECIDED, reason="HiGHS: kUnknown")
    )
    found = solve(mix())
    assert (found.engine, found.status) == (CBC, OPTIMAL)


# ---- boxes -------------------------------------------------------------------------------------


@BOTH
def test_boxes_that_share_time_lie_apart(engine: str) -> None:
    def box(name: str, size: float, begin: float, end: float) -> Box:
        return Box(start=name, size=size, begin=begin, end=end)

    names = {"a": 3.0, "b": 2.0, "c": 3.0}
    question = program(
        {"top": 1.0},
        [Variable("top", 0, 20), *(Variable(name, 0, 20) for name in names)],
        [Row(f"{n} below", {n: 1.0, "top": -1.0}, AT_MOST, -size) for n, size in names.items()],
        boxes=(box("a", 3, 0, 2), box("b", 2, 1, 4), box("c", 3, 2, 5)),
    )
    found = solve(question, engine=engine)
    assert (found.status, found.objective) == (OPTIMAL, pytest.approx(5.0))
    assert set(found.values) == {"top", *names}  # no choice of the disjunction shows
    clash = dict(found.values) | {"b": found.values["a"]}
    point = np.array([clash[v.name] for v in question.variables])
    assert seam.worst_miss(question, point) is not None


# ---- words and files ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kind", ["lp", "mps"])
def test_files_hold_the_same_program(engine: str, kind: str, tmp_path: Path) -> None:
    question = program(
        {"tensor parallel [0]": 3.0, "tensor-parallel (0)": 5.0},
        [Variable("tensor parallel [0]", -1, 4, True), Variable("tensor-parallel (0)")],
        [Row("a row: <= 1", {"tensor parallel [0]": 1.0, "tensor-parallel (0)": 2.0}, AT_MOST, 9),
         Row("a row; <= 2", {"tensor parallel [0]": -1.0, "tensor-parallel (0)": 2.0}, AT_MOST, 3)],
        sense=MAXIMISE, constant=7.0,
    )  # fmt: skip
    path = tmp_path / f"program.{kind}"
    engines.export(question, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    assert model.readModel(str(path)) == highspy.HighsStatus.kOk
    model.run()
    assert model.getObjectiveValue() == pytest.approx(solve(question, engine=engine).objective)
    assert (model.getNumRow(), model.getNumCol()) == (2, 3)  # one column is the constant


def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "program.lp"
    path.write_text("before")
    monkeypatch.setattr(engines.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        engines.export(mix(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["program.lp"] and path.read_text() == "before"
    with pytest.raises(InputError, match="give lp or mps"):
        engines.export(mix(), tmp_path / "program.txt")


def test_the_program_in_words() -> None:
    shown = text(mix(), solve(mix())).splitlines()
    assert shown[0] == "test: 2 variables (0 whole), 3 rows"
    assert shown[1] == "  max 3 doors + 5 windows"
    assert "  plant 3: 3 doors + 2 windows <= 18    [18; one more: 1]" in shown
    assert shown[-1] == "  optimal: 36, bound 36 (highs)"
    many = program({}, [Variable(f"x{i}") for i in range(60)], [])
    assert "  ... 20 more variables" in text(many)
    broken = mix().with_rows(Row("order", {"doors": 1.0}, AT_LEAST, 9.0))
    assert "infeasible: plant 3, order, windows >= 0 cannot hold together" in text(
        broken, solve(broken)
    )


# ---- bad programs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": (Row("r", {"x": math.nan}, AT_MOST, 1.0),)}, "not finite"),
        ({"rows": (Row("r", {"y": 1.0}, AT_MOST, 1.0),)}, "unknown variable y"),
        ({"rows": (Row("r", {"x": 1.0}, "<", 1.0),)}, "unknown relation"),
        ({"rows": (Row("r", {}, AT_MOST, 1.0),) * 2}, "two rows"),
        ({"variables": (Variable("x"), Variable("x"))}, "two variables"),
        ({"variables": (Variable("x", math.nan),)}, "not a number"),
        ({"objective": {"x": math.inf}}, "not finite"),
        ({"boxes": (Box(start="z", size=1, begin=0, end=1),)}, "unknown variable z"),
    ],
)
def test_bad_programs_are_refused(change: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        dataclasses.replace(program({"x": 1.0}, [Variable("x")], []), **change)  # type: ignore[arg-type]


def test_bad_questions_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="highs"):
        solve(mix(), engine="higs")
    for wrong in ({"time_limit_s": 0.0}, {"gap_frac": -0.1}, {"time_limit_s": math.nan}):
        with pytest.raises(InputError, match="time limit"):
            solve(mix(), **wrong)  # type: ignore[arg-type]
    two = tuple(Box(start="x", size=1, begin=0, end=1) for _ in range(2))
    with pytest.raises(InputError, match="no bounds"):
        solve(program({"x": 1.0}, [Variable("x")], [], boxes=two))


def test_gaps() -> None:
    assert gap_frac(100.0, 99.0) == pytest.approx(0.01)
    assert gap_frac(-100.0, -101.0) == pytest.approx(0.01)
    assert gap_frac(1.0, math.nan) == math.inf
    assert Solution(status=UNDECIDED, engine=HIGHS, solve_s=0.0).gap_frac == math.inf

"""CP-SAT behind the seam: absent it says so in a line; present it proves what others cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from hwmodels.errors import InputError
from simulator.planners import cp_sat
from simulator.planners.program import (
    AT_LEAST,
    AT_MOST,
    CP_SAT,
    EQUAL,
    FEASIBLE,
    INFEASIBLE,
    MAXIMISE,
    OPTIMAL,
    UNDECIDED,
    Program,
    Row,
    Variable,
    solve,
)
from simulator.planners.storage import Placement, _FirstFit, place, proved
from tests.simulator.planners.storage_cases import ABOVE_LIVE, HARD_60, random_tensors
from tests.simulator.planners.test_program import market_split, mix

present = pytest.mark.skipif(not cp_sat.available(), reason="OR-tools is not installed")


def sack(limit: float = 10.0) -> Program:
    """Two of three things in a sack, 9 at best."""
    sizes, worths = {"a": 6.0, "b": 5.0, "c": 4.0}, {"a": 5.5, "b": 5.0, "c": 3.5}
    return Program(
        name="sack", sense=MAXIMISE, objective=worths, constant=0.0,
        variables=tuple(Variable(name, 0, 1, True) for name in sizes),
        rows=(Row("room", sizes, AT_MOST, limit),),
    )  # fmt: skip


# ---- without OR-tools --------------------------------------------------------------------------


def test_absence_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp_sat, "available", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'ridgeplan\[cp-sat\]'") as told:
        solve(sack(), engine=CP_SAT)
    assert "\n" not in str(told.value)


def answered(monkeypatch: pytest.MonkeyPatch, **found: Any) -> list[dict[str, Any]]:
    """CP-SAT replaced by a given answer; what it was asked."""
    asked: list[dict[str, Any]] = []

    def run(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable and command[-1].endswith("cp_sat_worker.py")
        asked.append(json.loads(input))
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(found), stderr="")

    monkeypatch.setattr(cp_sat, "available", lambda: True)
    monkeypatch.setattr(cp_sat.subprocess, "run", run)
    return asked


def test_what_the_worker_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answered(monkeypatch, status="OPTIMAL", values=[1, 0, 1], bound=-90.0)
    found = solve(sack(), engine=CP_SAT, time_limit_s=3, gap_frac=0.01, hint={"b": 1.0})
    assert (found.status, found.objective, found.bound) == (OPTIMAL, 9.0, 9.0)
    (question,) = asked
    assert question["variables"] == [[0, 1]] * 3
    assert question["rows"] == [{"terms": [[0, 6], [1, 5], [2, 4]], "relation": "<=", "right": 10}]
    assert question["objective"] == [[0, -55], [1, -50], [2, -35]]  # tenths, and a minimum
    assert question["hint"] == [[1, 1]] and question["gap_frac"] == 0.01
    assert 0 < question["time_limit_s"] <= 3


def test_places_are_counted_in_the_sizes_divisor(monkeypatch: pytest.MonkeyPatch) -> None:
    given = random_tensors(3, np.random.default_rng(0), largest=9).aligned(512)
    best = place(given)
    values = [best.peak_bytes // 512, *(best.addresses // 512).tolist()]
    asked = answered(monkeypatch, status="OPTIMAL", values=values, bound=float(values[0]))
    found, answer = proved(best, engine=CP_SAT)
    assert asked[0]["unit"] == 512
    assert [box[1] for box in asked[0]["boxes"]] == (given.sizes // 512).tolist()
    assert (found.status, answer.objective) == (OPTIMAL, best.peak_bytes)


@pytest.mark.parametrize(
    ("found", "status", "reason"),
    [
        ({"status": "INFEASIBLE"}, INFEASIBLE, ""),
        ({"status": "UNKNOWN", "bound": -95.0}, UNDECIDED, "limit"),
        ({"status": "FEASIBLE", "values": [1, 0, 0], "bound": -95.0}, FEASIBLE, "limit"),
        ({"status": "OPTIMAL", "values": [1, 1, 0], "bound": -105.0}, UNDECIDED, "room"),
        ({"status": "MODEL_INVALID"}, UNDECIDED, "MODEL_INVALID"),
    ],
)
def test_its_words_are_checked(
    found: dict[str, Any], status: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(monkeypatch, **found)
    answer = solve(sack(), engine=CP_SAT, explain=False)
    assert answer.status == status and reason in answer.reason
    if status == FEASIBLE:
        assert (answer.objective, answer.bound) == (5.5, 9.5)


def test_a_worker_that_fails_or_hangs_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp_sat, "available", lambda: True)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nValueError: no")
    monkeypatch.setattr(cp_sat.subprocess, "run", lambda *_, **__: failed)
    found = solve(sack(), engine=CP_SAT)
    assert found.status == UNDECIDED and "ValueError: no" in found.reason

    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("python", 1.0)

    monkeypatch.setattr(cp_sat.subprocess, "run", hang)
    assert "limit" in solve(sack(), engine=CP_SAT).reason


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"variables": (Variable("x"),)}, "whole with finite bounds"),
        ({"variables": (Variable("x", 0, 4),)}, "whole with finite bounds"),
        ({"rows": (Row("half", {"x": 0.5}, AT_MOST, 1.0),)}, "half has 0.5"),
        ({"objective": {"x": 1 / 3}}, "nine decimals"),
    ],
)
def test_it_takes_whole_numbers_only(
    change: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp_sat, "available", lambda: True)
    given: dict[str, Any] = {
        "name": "p", "variables": (Variable("x", 0, 4, True),), "rows": (), "objective": {"x": 1.0},
    }  # fmt: skip
    with pytest.raises(InputError, match=told):
        solve(Program(**given | change), engine=CP_SAT)


# ---- with OR-tools -----------------------------------------------------------------------------


@present
def test_it_agrees_on_small_programs() -> None:
    assert solve(sack(), engine=CP_SAT).objective == solve(sack()).objective == 9.0
    assert solve(sack(3.0), engine=CP_SAT).objective == 0.0
    whole = mix(whole=True)
    bounded = Program(
        name="mix", sense=MAXIMISE, objective=whole.objective, rows=whole.rows,
        variables=tuple(Variable(v.name, 0, 99, True) for v in whole.variables),
    )  # fmt: skip
    found = solve(bounded, engine=CP_SAT)
    assert (found.status, found.objective, found.bound) == (OPTIMAL, 36.0, 36.0)
    broken = bounded.with_rows(Row("order", {"doors": 1.0, "windows": 1.0}, AT_LEAST, 9.0))
    found = solve(broken, engine=CP_SAT)
    assert found.status == INFEASIBLE
    assert found.conflict is not None and set(found.conflict.rows) >= {"order"}


@present
def test_a_time_limit_is_feasible_or_undecided() -> None:
    split = market_split()
    whole = tuple(Variable(v.name, 0, min(v.upper, 4000), True) for v in split.variables)
    hard = Program(name="split", objective=split.objective, rows=split.rows, variables=whole)
    found = solve(hard, engine=CP_SAT, time_limit_s=1.0)
    assert found.status in (FEASIBLE, UNDECIDED) and "limit" in found.reason
    assert found.bound <= 1.0 + 1e-9
    assert not found.has_point or found.objective >= 1.0


@present
def test_it_proves_that_live_bytes_cannot_be_met() -> None:
    found, answer = proved(place(ABOVE_LIVE, time_limit_s=0.05), engine=CP_SAT)
    assert (found.peak_bytes, found.lower_bytes, answer.engine) == (9, 9, CP_SAT)


@present
@pytest.mark.slow
def test_it_proves_the_hard_case_of_60_tensors() -> None:
    """From tensors by size, far above: the search for stacks would leave nothing to prove."""
    order = np.argsort(-HARD_60.sizes, kind="stable")
    _, addresses = _FirstFit(HARD_60).placed(order)
    start = Placement(
        tensors=HARD_60, addresses=addresses, lower_bytes=HARD_60.live_bytes, method="by size",
        solve_s=0.0,
    )  # fmt: skip
    assert start.gap_frac > 0.04
    found, answer = proved(start, engine=CP_SAT, time_limit_s=120)
    assert not list(found.overlaps())
    assert (found.status, answer.status) == (OPTIMAL, OPTIMAL)
    assert found.peak_bytes == found.lower_bytes


@present
def test_the_process_loads_nothing_of_ours() -> None:
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "print(any(m.startswith(('simulator', 'highspy', 'pulp')) for m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(cp_sat.WORKER)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"


@present
def test_equality_rows_and_shifted_bounds() -> None:
    question = Program(
        name="p", objective={"x": 1.0, "y": 2.0}, constant=3.0,
        variables=(Variable("x", -4, 4, True), Variable("y", -4, 4, True)),
        rows=(Row("sum", {"x": 1.0, "y": 1.0}, EQUAL, 1.0),),
    )  # fmt: skip
    found = solve(question, engine=CP_SAT)
    assert (found.objective, found.values) == (1.0, {"x": 4.0, "y": -3.0})

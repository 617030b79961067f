"""CP-SAT behind `program.solve`, for whole numbers and boxes: OR-tools, in a process of its own.

OR-tools and highspy must not share a process (both bring a HiGHS), and OR-tools is heavy: it is an
optional extra, and `cp_sat_worker.py` runs in an interpreter started for one program. Every
variable must be whole with finite bounds and every number of a row a whole one; sizes are divided
by their greatest common divisor first. One thread gives the same answer every time; on packings it
was also faster than eight.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from hwmodels.errors import InputError
from simulator.planners.program import (
    FEASIBLE,
    INFEASIBLE,
    MAXIMISE,
    OPTIMAL,
    UNDECIDED,
    Answer,
    Program,
)

WORKER: Final = Path(__file__).with_name("cp_sat_worker.py")
MISSING: Final = "the engine 'cp-sat' needs OR-tools; pip install 'ridgeplan[cp-sat]'"
GRACE_S: Final = 30.0
"""For starting the interpreter and loading OR-tools, beyond the time limit."""
MOST: Final = 2**62


def available() -> bool:
    """Is OR-tools installed?"""
    return find_spec("ortools") is not None


def run(
    program: Program,
    *,
    time_limit_s: float,
    gap_frac: float,
    hint: Mapping[str, float] | None = None,
) -> Answer:
    """One run; its claims unchecked."""
    if not available():
        raise InputError(MISSING)
    question = _question(program, hint or {})
    question |= {"time_limit_s": time_limit_s, "gap_frac": gap_frac}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(WORKER)], input=json.dumps(question), text=True,
            capture_output=True, timeout=time_limit_s + GRACE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(claim=UNDECIDED, reason="the time limit: CP-SAT did not stop by itself")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return Answer(claim=UNDECIDED, reason=f"CP-SAT failed: {lines[-1]}")
    return _read(program, json.loads(done.stdout), question["unit"], question["cost_unit"])


def _read(program: Program, found: Mapping[str, Any], unit: int, cost_unit: float) -> Answer:
    claim = {"OPTIMAL": OPTIMAL, "FEASIBLE": FEASIBLE, "INFEASIBLE": INFEASIBLE}.get(
        found["status"], UNDECIDED
    )
    point = found.get("values")
    sign = -1.0 if program.sense == MAXIMISE else 1.0
    bound = found.get("bound")
    return Answer(
        claim=claim,
        reason="" if claim in (OPTIMAL, INFEASIBLE) else f"the time limit ({found['status']})",
        point=None if point is None else np.asarray(point, dtype=np.float64) * unit,
        bound=math.nan if bound is None else sign * bound * cost_unit + program.constant,
    )


def _question(program: Program, hint: Mapping[str, float]) -> dict[str, Any]:
    """Integers only, in units of their divisor."""
    index = program.index
    unit = _unit(program)
    for one in program.variables:
        if not one.whole or not math.isfinite(one.lower) or not math.isfinite(one.upper):
            raise InputError(f"cp-sat: {one.name} must be whole with finite bounds; use highs")
    costs, cost_unit = _costs(program)
    sign = -1 if program.sense == MAXIMISE else 1
    return {
        "unit": unit,
        "cost_unit": cost_unit * unit,
        "variables": [
            [math.ceil(one.lower / unit), math.floor(one.upper / unit)] for one in program.variables
        ],
        "rows": [
            {
                "terms": [
                    [index[n], whole(value, row.name)] for n, value in row.terms.items() if value
                ],
                "relation": row.relation,
                "right": _right(whole(row.right, row.name), unit, row.relation),
            }
            for row in program.rows
        ],
        "objective": [[index[n], sign * value] for n, value in costs.items() if value],
        "boxes": [
            [index[box.start], whole(box.size, box.start) // unit, whole(box.begin, box.start),
             whole(box.end, box.start)]
            for box in program.boxes
        ],
        "hint": [[index[n], round(value / unit)] for n, value in hint.items() if n in index],
    }  # fmt: skip


def _right(right: int, unit: int, relation: str) -> int:
    """The right side in units; rounding towards what still holds for whole units."""
    return -(-right // unit) if relation == ">=" else right // unit


def whole(value: float, where: str) -> int:
    """The number as an integer; refused where it is none."""
    if value != round(value) or abs(value) > MOST:
        raise InputError(f"cp-sat: {where} has {value}, which is not a whole number; use highs")
    return round(value)


def _unit(program: Program) -> int:
    """What divides every size and right side where boxes and rows only add and compare places.

    Only then may places be counted in it: each lies, in some best solution, at a sum of sizes.
    """
    plain = all(abs(value) == 1 for row in program.rows for value in row.terms.values())
    if not plain or not program.boxes:
        return 1
    sizes: Iterable[float] = (
        *(box.size for box in program.boxes), *(row.right for row in program.rows),
        *(one.lower for one in program.variables),
    )  # fmt: skip
    return max(math.gcd(*(whole(value, "a size") for value in sizes)), 1)


def _costs(program: Program) -> tuple[dict[str, int], float]:
    """Whole coefficients of the objective and the unit they are counted in."""
    for power in range(10):
        unit = 10.0**-power
        costs = {name: c / unit for name, c in program.objective.items()}
        if all(abs(c - round(c)) <= 1e-12 * abs(c) for c in costs.values()):
            return {name: round(c) for name, c in costs.items()}, unit
    raise InputError("cp-sat: the objective has more than nine decimals; rescale it or use highs")

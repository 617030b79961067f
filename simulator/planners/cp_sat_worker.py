"""The process that CP-SAT runs in: a program as JSON on stdin, what was found on stdout.

Started by `cp_sat.py` with nothing of ours on its path: OR-tools must not meet highspy.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Solve the program on stdin."""
    question = json.load(sys.stdin)
    json.dump(solved(question), sys.stdout)


def solved(question: dict[str, Any]) -> dict[str, Any]:
    """Status word, values, and proven bound."""
    from ortools.sat.python import cp_model

    model, unknowns = built(question, cp_model)
    solver = cp_model.CpSolver()
    given = solver.parameters
    given.max_time_in_seconds = question["time_limit_s"]
    given.relative_gap_limit = question["gap_frac"]
    given.random_seed = 0
    given.num_workers = 1  # the same answer every time
    status = solver.status_name(solver.solve(model))
    found: dict[str, Any] = {"status": status}
    if status in ("OPTIMAL", "FEASIBLE"):
        found["values"] = [solver.value(one) for one in unknowns]
    if question["objective"] and status in ("OPTIMAL", "FEASIBLE", "UNKNOWN"):
        found["bound"] = solver.best_objective_bound
    return found


def built(question: dict[str, Any], cp_model: Any) -> tuple[Any, list[Any]]:
    """The model and its variables in order."""
    model = cp_model.CpModel()
    unknowns = [
        model.new_int_var(low, high, f"x{i}") for i, (low, high) in enumerate(question["variables"])
    ]
    for row in question["rows"]:
        left = sum(value * unknowns[j] for j, value in row["terms"])
        relation, right = row["relation"], row["right"]
        model.add(left <= right if relation == "<=" else left >= right if relation == ">="
                  else left == right)  # fmt: skip
    across, along = [], []
    for i, (j, size, begin, end) in enumerate(question["boxes"]):
        across.append(model.new_fixed_size_interval_var(begin, end - begin, f"t{i}"))
        along.append(model.new_fixed_size_interval_var(unknowns[j], size, f"a{i}"))
    if across:
        model.add_no_overlap_2d(across, along)
    if question["objective"]:
        model.minimize(sum(value * unknowns[j] for j, value in question["objective"]))
    for j, value in question["hint"]:
        model.add_hint(unknowns[j], value)
    return model, unknowns


if __name__ == "__main__":
    main()

"""The program of one makespan with names and numbers, on the solver seam: what explains a bound."""

from __future__ import annotations

import numpy as np

from simulator.planners.group_bound import CUTS, Question, classes
from simulator.planners.program import AT_MOST, EQUAL, Program, Row, Variable
from simulator.variable_length import GroupCost, Ints


def program_at(
    held: Ints, cost: GroupCost, num_ranks: int, seconds: float, *, num_classes: int
) -> Program:
    """(1) to (5) of `group_bound` at a makespan, n_d whole, classes at their mean lengths."""
    kinds = classes(held, num_classes)
    question = Question.of(kinds.means, cost, num_ranks)
    parts, fits = question.parts(seconds)
    rules = ["time", "room", *(f"{what} over 1/{z + 1}" for z in CUTS for what in ("time", "room"))]
    right = [1, 1, *(z for z in CUTS for _ in range(2))]
    sizes = question.sizes.tolist()
    taken = {(i, q): f"tokens~{kinds.means[q]:.0f} on {sizes[i]}" for i, q in np.argwhere(fits)}
    rows = [
        Row(
            f"{rule} of groups of {d}",
            {name: float(parts[r, i, q]) for (j, q), name in taken.items()
             if i == j and parts[r, i, q] > 0} | {f"groups of {d}": -float(right[r])},
            AT_MOST,
            0.0,
        )
        for i, d in enumerate(sizes)
        for r, rule in enumerate(rules)
        if any(parts[r, i, q] > 0 for j, q in taken if i == j)
    ]  # fmt: skip
    every = [
        Row(
            f"all of tokens~{kinds.means[q]:.0f}",
            {name: 1.0 for (_, k), name in taken.items() if k == q},
            EQUAL,
            float(count),
        )
        for q, count in enumerate(kinds.counts.tolist())
    ]
    return Program(
        name=f"ranks needed within {seconds:.6g} s",
        variables=(
            *(Variable(f"groups of {d}", 0.0, float(num_ranks // d), True) for d in sizes),
            *(Variable(name, 0.0, float(kinds.counts[q])) for (_, q), name in taken.items()),
        ),
        rows=(*every, *rows),
        objective={f"groups of {d}": float(d) for d in sizes},
    )

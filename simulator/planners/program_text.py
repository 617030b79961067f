"""A program for people: objective and rows with their numbers, and what a solver made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from simulator.planners.program import Program, Solution

MOST_TERMS: Final = 6
MOST_LINES: Final = 40


def text(program: Program, found: Solution | None = None, *, most: int = MOST_LINES) -> str:
    """The program with its numbers; with a solution also each row's value and dual.

    >>> from simulator.planners.program import AT_MOST, Row, Variable, solve
    >>> p = Program(name="swap", objective={"alpha": 1.0}, sense="max",
    ...     variables=(Variable("alpha", upper=1.0),),
    ...     rows=(Row("copy hidden", {"alpha": 3.0}, AT_MOST, 2.0),))
    >>> print(text(p, solve(p)))
    swap: 1 variable (0 whole), 1 row
      max alpha
      copy hidden: 3 alpha <= 2    [2; one more: 0.333333]
      0 <= alpha <= 1    [0.666667]
      optimal: 0.666667, bound 0.666667 (highs)
    """
    return "\n".join(_lines(program, found, most))


def _lines(program: Program, found: Solution | None, most: int) -> Iterator[str]:
    whole = sum(one.whole for one in program.variables)
    yield (
        f"{program.name}: {_counted(len(program.variables), 'variable')} ({whole} whole), "
        f"{_counted(len(program.rows), 'row')}"
        + (f", {_counted(len(program.boxes), 'box', 'boxes')}" if program.boxes else "")
    )
    constant = f" + {program.constant:.6g}" if program.constant else ""
    yield f"  {program.sense} {expression(program.objective)}{constant}"
    values = found.values if found is not None else {}
    for row in program.rows[:most]:
        line = f"  {row.name}: {expression(row.terms)} {row.relation} {row.right:.6g}"
        yield line + _at(row.name, row.terms, values, found)
    yield from _more(len(program.rows), most, "row")
    for one in program.variables[:most]:
        kind = ", whole" if one.whole else ""
        value = f"    [{values[one.name]:.6g}]" if one.name in values else ""
        yield f"  {one.lower:.6g} <= {one.name} <= {one.upper:.6g}{kind}{value}"
    yield from _more(len(program.variables), most, "variable")
    if program.boxes:
        yield "  no two boxes that share time share a place:"
    for box in program.boxes[:most]:
        yield f"    {box.start} .. + {box.size:.6g} from {box.begin:g} to {box.end:g}"
    yield from _more(len(program.boxes), most, "box", "boxes")
    if found is not None:
        yield f"  {outcome(found)}"


def _at(name: str, terms: Mapping[str, float], values: Mapping[str, float],
        found: Solution | None) -> str:  # fmt: skip
    if not values:
        return ""
    left = sum(value * values[one] for one, value in terms.items())
    dual = found.duals.get(name, 0.0) if found is not None and found.duals else 0.0
    return f"    [{left:.6g}" + (f"; one more: {dual:.6g}]" if dual else "]")


def expression(terms: Mapping[str, float]) -> str:
    """A sum with its numbers, cut after a few terms.

    >>> expression({"x": 1.0, "y": -2.5}), expression({})
    ('x - 2.5 y', '0')
    """
    parts: list[str] = []
    for name, value in list(terms.items())[:MOST_TERMS]:
        size = "" if abs(value) == 1 else f"{abs(value):.6g} "
        sign = ("- " if value < 0 else "+ ") if parts else "-" if value < 0 else ""
        parts.append(f"{sign}{size}{name}")
    left = len(terms) - MOST_TERMS
    return " ".join([*parts, *([f"+ {left} more"] if left > 0 else [])]) or "0"


def outcome(found: Solution) -> str:
    """The status in words, with what is proven.

    >>> outcome(Solution(status="infeasible", engine="highs", solve_s=0.0))
    'infeasible (highs)'
    """
    words = found.status
    if found.has_point:
        words += f": {found.objective:.6g}, bound {found.bound:.6g}"
    if found.reason:
        words += f"; {found.reason}"
    if found.conflict is not None:
        words += f": {found.conflict} cannot hold together"
    if found.ray:
        words += f": {', '.join(found.ray)} run without end"
    return f"{words} ({found.engine})"


def _more(number: int, most: int, noun: str, plural: str = "") -> Iterator[str]:
    if number > most:
        yield f"  ... {_counted(number - most, f'more {noun}', plural and f'more {plural}')}"


def _counted(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"

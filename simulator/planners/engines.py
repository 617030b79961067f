"""HiGHS and CBC behind `program.solve`, through PuLP: numbers in, an engine's own words out.

PuLP calls an incumbent at the time limit "Optimal", an unbounded program "Infeasible" where HiGHS
cannot tell, and drops the bound; so the bound and the reason to stop are read from the engine: from
HiGHS' model status and info, from CBC's log. Every program is scaled first, by powers of two so
that no digit is lost: rows and continuous columns by the geometric mean of their numbers, the
objective to coefficients of at most `OBJECTIVE_SIZE`.

    x = s x',  row i:  r_i a_ij s_j x'_j <= r_i b_i,   objective:  o c_j s_j x'_j
    dual_i = r_i dual'_i / o,   reduced cost_j = reduced'_j / (o s_j),   bound = bound' / o

Both engines run on one thread with a fixed seed. CBC hands its numbers over in a file, with about
nine digits.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from hwmodels.errors import InputError
from simulator.planners.program import (
    AT_MOST,
    CBC,
    EQUAL,
    FEASIBLE,
    HIGHS,
    INFEASIBLE,
    MAXIMISE,
    OPTIMAL,
    UNBOUNDED,
    UNDECIDED,
    Answer,
    Floats,
    Program,
    Variable,
)

OBJECTIVE_SIZE: Final = 1024.0
"""Largest coefficient of the objective that an engine sees: its tolerances are absolute."""
TOLERANCE: Final = 1e-9
SCALING_ROUNDS: Final = 4
FORMATS: Final = ("lp", "mps")
TIME_LIMIT: Final = "the time limit"


def available(engine: str) -> bool:
    """Can the engine run here?"""
    if engine == HIGHS:
        return find_spec("highspy") is not None
    return engine == CBC and bool(_cbc().available())


def run(program: Program, engine: str, *, time_limit_s: float, gap_frac: float) -> Answer:
    """One run of one engine; its claims unchecked."""
    if not available(engine):
        raise InputError(f"the engine '{engine}' is not installed; leave the choice open")
    scaled = _Scaled.of(program)
    if engine == HIGHS:
        return _run_highs(program, scaled, time_limit_s, gap_frac)
    return _run_cbc(program, scaled, time_limit_s, gap_frac)


# ---- scaling -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A program as PuLP has it, always a minimum, and the factors that lead back."""

    problem: Any
    variables: list[Any]
    rows: list[Any]
    column: Floats
    row: Floats
    objective: float
    sign: float
    constant: float

    @staticmethod
    def of(program: Program) -> _Scaled:
        """The scaled program."""
        row, column = _factors(program)
        sign = -1.0 if program.sense == MAXIMISE else 1.0
        index = program.index
        costs = {name: sign * c * column[index[name]] for name, c in program.objective.items()}
        largest = max(map(abs, costs.values()), default=0.0)
        factor = float(_power(OBJECTIVE_SIZE / largest)) if largest else 1.0
        names = [f"x{i}" for i in range(len(program.variables))]
        problem, variables, rows = _problem(
            program, {n: factor * c for n, c in costs.items()}, row, column, names,
            [f"r{i}" for i in range(len(program.rows))],
        )  # fmt: skip
        return _Scaled(problem, variables, rows, column, row, factor, sign, program.constant)

    def bound(self, value: float) -> float:
        """An engine's bound in the program's units; NaN where it has none."""
        finite = math.isfinite(value) and abs(value) < 1e49
        return self.sign * value / self.objective + self.constant if finite else math.nan

    def point(self) -> Floats:
        """What the engine left in the variables; those that nothing mentions are nearest to 0."""
        values = [_known(one.varValue, _nearest_zero(one)) for one in self.variables]
        return np.asarray(values) * self.column

    def duals(self) -> Floats:
        """Duals of the rows in the program's units and sense."""
        values = np.asarray([_known(row.pi, 0.0) for row in self.rows])
        return self.sign * values * self.row / self.objective

    def reduced_costs(self) -> Floats:
        """Reduced costs of the variables in the program's units and sense."""
        values = np.asarray([_known(one.dj, 0.0) for one in self.variables])
        return self.sign * values / (self.objective * self.column)


def _nearest_zero(variable: Any) -> float:
    low, high = variable.lowBound, variable.upBound
    return float(max(low, 0.0) if low is not None and low > 0 else min(high or 0.0, 0.0))


def _known(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else float(value)


def _factors(program: Program) -> tuple[Floats, Floats]:
    """Powers of two for rows and columns; whole variables keep their unit."""
    index = program.index
    entries = [
        (i, index[name], abs(value))
        for i, row in enumerate(program.rows)
        for name, value in row.terms.items()
        if value
    ]
    rows, columns = np.ones(len(program.rows)), np.ones(len(program.variables))
    if not entries:
        return rows, columns
    i, j, size = (np.asarray(part) for part in zip(*entries, strict=True))
    log = np.log2(size.astype(np.float64))
    free = np.array([not one.whole for one in program.variables])
    r, c = np.zeros(len(rows)), np.zeros(len(columns))
    in_row = np.maximum(np.bincount(i, minlength=len(rows)), 1)
    in_column = np.maximum(np.bincount(j, minlength=len(columns)), 1)
    for _ in range(SCALING_ROUNDS):
        r = -np.bincount(i, log + c[j], minlength=len(rows)) / in_row
        c = np.where(free, -np.bincount(j, log + r[i], minlength=len(columns)) / in_column, 0.0)
    return np.exp2(np.round(r)), np.exp2(np.round(c))


def _power(value: float) -> float:
    return math.ldexp(1.0, math.floor(math.log2(value)))


def _problem(
    program: Program,
    objective: dict[str, float],
    row: Floats,
    column: Floats,
    names: list[str],
    row_names: list[str],
    *,
    sense: str = "min",
) -> tuple[Any, list[Any], list[Any]]:
    """PuLP's problem with its variables and rows in order."""
    import pulp

    kind = pulp.LpMaximize if sense == MAXIMISE else pulp.LpMinimize
    problem = pulp.LpProblem("program", kind)
    variables = [
        problem.add_variable(
            name, _finite(one.lower / s), _finite(one.upper / s),
            cat="Integer" if one.whole else "Continuous",
        )
        for name, one, s in zip(names, program.variables, column.tolist(), strict=True)
    ]  # fmt: skip
    index = program.index
    terms = {variables[index[name]]: value for name, value in objective.items() if value}
    problem.setObjective(pulp.LpAffineExpression(terms))
    relations = {AT_MOST: pulp.LpConstraintLE, EQUAL: pulp.LpConstraintEQ}
    rows = []
    factors = column.tolist()
    for one, name, r in zip(program.rows, row_names, row.tolist(), strict=True):
        left = {
            variables[index[n]]: value * r * factors[index[n]] for n, value in one.terms.items()
        }
        made = pulp.LpConstraint(
            pulp.LpAffineExpression(left), relations.get(one.relation, pulp.LpConstraintGE),
            name, one.right * r,
        )  # fmt: skip
        problem.addConstraint(made)
        rows.append(made)
    return problem, variables, rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- HiGHS -------------------------------------------------------------------------------------


def _run_highs(program: Program, scaled: _Scaled, limit_s: float, gap_frac: float) -> Answer:
    import pulp

    solver = pulp.HiGHS(
        msg=False, timeLimit=limit_s, gapRel=gap_frac, gapAbs=0.0, parallel="off", random_seed=0,
        primal_feasibility_tolerance=TOLERANCE, dual_feasibility_tolerance=TOLERANCE,
        mip_feasibility_tolerance=TOLERANCE,
    )  # fmt: skip
    problem = scaled.problem
    solver.createAndConfigureSolver(problem)
    solver.buildSolverModel(problem)
    model = problem.solverModel
    model.run()
    import highspy

    words, info = highspy.HighsModelStatus, model.getInfo()
    status = model.getModelStatus()
    if status in (words.kInfeasible, words.kUnboundedOrInfeasible, words.kUnbounded):
        return Answer(claim=UNBOUNDED if status == words.kUnbounded else INFEASIBLE)
    feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    done = status in (words.kOptimal, words.kModelEmpty)
    point = None
    if feasible or done:
        solver.findSolutionValues(problem)
        point = scaled.point()
    linear = not program.is_whole
    return Answer(
        claim=OPTIMAL if done else FEASIBLE if feasible else UNDECIDED,
        reason=TIME_LIMIT
        if status == words.kTimeLimit
        else ""
        if done
        else f"HiGHS: {status.name}",
        point=point,
        bound=math.nan if linear else scaled.bound(info.mip_dual_bound),
        duals=scaled.duals() if linear and done else None,
        reduced_costs=scaled.reduced_costs() if linear and done else None,
    )


# ---- CBC ---------------------------------------------------------------------------------------


def _cbc(**options: Any) -> Any:
    """PuLP's CBC: the program it brings along, else one on the path."""
    import pulp

    bundled = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", None)
    return pulp.COIN_CMD(path=bundled, msg=False, **options)


def _run_cbc(program: Program, scaled: _Scaled, limit_s: float, gap_frac: float) -> Answer:
    import pulp

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        solver = _cbc(
            timeLimit=limit_s, gapRel=gap_frac, gapAbs=0.0, logPath=str(log),
            options=["primalTolerance 1e-9", "dualTolerance 1e-9", "integerTolerance 1e-9",
                     "increment 1e-9", "randomSeed 1", "randomCbcSeed 1"],
        )  # fmt: skip
        solver.tmpDir = folder
        try:
            scaled.problem.solve(solver)
        except pulp.PulpSolverError as error:
            return Answer(claim=UNDECIDED, reason=f"CBC failed: {error}")
        text = log.read_text(encoding="utf-8", errors="replace")
    return _read_cbc(program, scaled, text)


_RESULT: Final = re.compile(r"Result - (.+)")
_LOWER: Final = re.compile(r"Lower bound:\s+(-?[\d.]+)")
_BEST: Final = re.compile(r"best possible (-?[\d.e+]+)")


def _read_cbc(program: Program, scaled: _Scaled, log: str) -> Answer:
    """CBC's words: PuLP's status for linear programs, the log's result and bound otherwise."""
    import pulp

    problem = scaled.problem
    result = found[1].strip() if (found := _RESULT.search(log)) else ""
    stopped = "Stopped" in result or "limit" in result.casefold()
    if problem.sol_status in (pulp.LpSolutionInfeasible, pulp.LpSolutionUnbounded) and not stopped:
        unbounded = problem.sol_status == pulp.LpSolutionUnbounded
        return Answer(claim=UNBOUNDED if unbounded else INFEASIBLE)
    if "infeasible or unbounded" in log:  # by presolve, which leaves no result
        return Answer(claim=INFEASIBLE)
    optimal = problem.sol_status == pulp.LpSolutionOptimal and not stopped
    has_point = optimal or problem.sol_status == pulp.LpSolutionIntegerFeasible
    linear = not program.is_whole
    within_gap = "within gap" in result
    exact = optimal and not within_gap
    return Answer(
        claim=OPTIMAL if optimal else FEASIBLE if has_point else UNDECIDED,
        reason="" if optimal else TIME_LIMIT if stopped else f"CBC: {result or 'no result'}",
        point=scaled.point() if has_point and not (linear and not optimal) else None,
        bound=math.nan if exact else scaled.bound(_cbc_bound(log)),
        duals=scaled.duals() if linear and optimal else None,
        reduced_costs=scaled.reduced_costs() if linear and optimal else None,
    )


def _cbc_bound(log: str) -> float:
    """The bound in CBC's log, less one in its last printed place; the tightest of those printed."""
    bounds = [_less(text) for text in (*_LOWER.findall(log), *_BEST.findall(log)[-1:])]
    return max(bounds, default=math.nan)


def _less(text: str) -> float:
    mantissa, _, exponent = text.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(text) - 10.0 ** (int(exponent or 0) - decimals)


# ---- files -------------------------------------------------------------------------------------


def exported(program: Program, kind: str) -> str:
    """The program as the text of an LP or MPS file, names kept as far as the format takes them."""
    if kind not in FORMATS:
        raise InputError(f"unknown program format '{kind}'; give lp or mps")
    program = _with_constant(program.linear)
    ones = np.ones(max(len(program.rows), len(program.variables)))
    problem, _, _ = _problem(
        program, dict(program.objective), ones[: len(program.rows)],
        ones[: len(program.variables)], _plain([one.name for one in program.variables], "x"),
        _plain([row.name for row in program.rows], "r"), sense=program.sense,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"program.{kind}"
        problem.writeLP(str(path)) if kind == "lp" else problem.writeMPS(str(path))
        text = path.read_text(encoding="utf-8")
    # PuLP tells an MPS file's sense in a comment only; readers would minimise.
    sense = "OBJSENSE\n    MAX\nROWS\n" if program.sense == MAXIMISE else "ROWS\n"
    return text.replace("ROWS\n", sense, 1) if kind == "mps" else text


def _with_constant(program: Program) -> Program:
    """The objective's constant as a variable that stands at 1: files have no other place for it."""
    if not program.constant:
        return program
    name = "constant of the objective"
    return dataclasses.replace(
        program, constant=0.0, variables=(*program.variables, Variable(name, 1.0, 1.0)),
        objective={**program.objective, name: program.constant},
    )  # fmt: skip


def export(program: Program, path: Path) -> None:
    """Write an .lp or .mps file: whole, or not at all."""
    text = exported(program, path.suffix.lower().lstrip("."))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _plain(names: list[str], letter: str) -> list[str]:
    """Names of letters, digits and underscores, unlike each other, none too long."""
    taken: set[str] = set()
    made = []
    for i, name in enumerate(names):
        plain = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:40]
        if not re.match(r"[A-DF-Za-df-z]", plain):  # a leading e reads as a number
            plain = f"{letter}_{plain}"
        plain = plain if plain not in taken else f"{plain}_{i}"
        taken.add(plain)
        made.append(plain)
    return made

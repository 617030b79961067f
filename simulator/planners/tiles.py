"""The best tiles of a matmul or of attention on a device, by exhaustion, and what binds them.

    min  T(x)   s.t.  every limit of `tile_rules`,  x in the finite domains there               (1)

with T the modelled seconds of `tile_times`. All feasible x are listed (`integers.solve`) and timed
at once, so the least is the optimum: bound = objective, gap 0. Ties go to less shared memory, then
to the smaller x. They are listed tile by tile (the first variable's values, those near 128 first):
a listing that a time limit or a wide enough gap ends early has `tile_bounds.least_seconds` for its
bound, and what it says of runners-up and of shared memory is said of the kernels listed.

The number of resident blocks is a variable, so T does not depend on how much shared memory there
is, only what is allowed does. With need(x) the least addition (positive or negative) to the shared
memory of a block and of an SM at which x is allowed, the true curve of values is

    V(delta) = min { T(x) : need(x) <= delta },   need(x) = max(smem - block limit,
                                                   resident (smem + 1 KiB) - SM limit)           (2)

a staircase that never rises: all x up to `HEADROOM_BYTES` more are listed once, sorted by need.
Each limit's worth is 1 - T without it / T, the others kept (3).

    Implemented in: `plan_tiles`, `_listed` (1), `_curve` (2), `_bindings` (3), `choice_program` (a
    linear program with the same optimum: one of the points that no other beats in seconds and
    needs).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np

from hwmodels.device import Device
from hwmodels.errors import InfeasibleError, InputError, UnsupportedError
from simulator.kernel_time.terms import overlap
from simulator.planners.integers import Program as Tiling
from simulator.planners.integers import solve
from simulator.planners.program import (
    AT_MOST,
    EQUAL,
    FEASIBLE,
    OPTIMAL,
    Program,
    Row,
    Variable,
    gap_frac,
)
from simulator.planners.tile_bounds import least_seconds
from simulator.planners.tile_rules import (
    REGISTERS,
    SHARED,
    SMEM,
    SMEM_SM,
    SYSTEM_BYTES,
    TENSOR_MEMORY,
    WHOLE,
    Chip,
    Space,
    attention_registers,
    attention_rules,
    attention_smem,
    matmul_registers,
    matmul_rules,
    matmul_smem,
)
from simulator.planners.tile_times import Floats, Speeds, Times, attention_seconds, matmul_seconds
from workloads.numeric import is_scalar
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import Matmul

Tiled: TypeAlias = Matmul | FlashAttention2
Table: TypeAlias = Mapping[str, Any]

KIB: Final = 1024
HEADROOM_BYTES: Final = 64 * KIB
"""How much more shared memory the curve looks at."""
USUAL_ROWS: Final = 128
"""Rows of the tiles that are listed first."""
RUNNERS_UP: Final = 5
SHAPES: Final = {Matmul: ("tile_m", "tile_n"), FlashAttention2: ("tile_q", "tile_k")}
"""What tells one kernel of the list of runners-up from another."""
PARTS: Final = ("loop", "epilogue", "memory", "adding parts", "start")
BITS: Final = (8, 16, 32)
"""Of operands in the program: narrower ones have scales, fp64 other instructions."""
TIE_FRAC: Final = 1e-9
"""Seconds nearer than this are one value: rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One point: its variables, seconds and what they are made of, and what it takes."""

    values: Mapping[str, int]
    seconds: float
    parts: Mapping[str, float]
    smem_bytes: int
    registers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The best kernel of another tile, and the part of the time that it loses most by."""

    kernel: Kernel
    slower_frac: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A limit without which a better kernel would be allowed, and how much better."""

    limit: str
    gain_frac: float
    kernel: Kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """From `more_smem_bytes` (negative: less than there is) on, the best takes that long."""

    more_smem_bytes: int
    seconds: float
    values: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """The optimum, who lost and why, what binds, and the curve of shared memory's value."""

    op: Tiled
    chip: Chip
    best: Kernel
    runners_up: tuple[RunnerUp, ...]
    bindings: tuple[Binding, ...]
    curve: tuple[CurvePoint, ...]
    program: Program
    num_kernels: int
    solve_s: float
    source: str
    bound_s: float
    """No kernel of the program is faster."""

    @property
    def gap_frac(self) -> float:
        """How much faster a kernel that was not listed may be."""
        return gap_frac(self.best.seconds, self.bound_s)

    @property
    def status(self) -> str:
        """Optimal where every kernel was listed, or none can be faster."""
        return OPTIMAL if self.gap_frac == 0 else FEASIBLE

    def seconds_with(self, more_smem_bytes: float) -> float:
        """V of equation (2); infinite where nothing is allowed."""
        found = [p.seconds for p in self.curve if p.more_smem_bytes <= more_smem_bytes]
        return found[-1] if found else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """The rules, needs and seconds of one op."""

    op: Tiled
    chip: Chip
    space: Space
    speeds: Speeds

    def rules(self, chip: Chip) -> Tiling:
        build: Callable[..., Tiling] = (
            matmul_rules if isinstance(self.op, Matmul) else attention_rules
        )
        return build(self.op, chip, self.space)

    def smem(self, v: Table) -> Any:
        if isinstance(self.op, Matmul):
            return matmul_smem(self.chip, self.op, v)
        return attention_smem(self.op, v)

    def registers(self, v: Table) -> Any:
        if isinstance(self.op, Matmul):
            return matmul_registers(self.chip, v)
        return attention_registers(self.chip, self.op, v)

    def seconds(self, v: Table) -> tuple[Floats, Times]:
        if isinstance(self.op, Matmul):
            return matmul_seconds(self.op, self.speeds, v)
        return attention_seconds(self.op, self.speeds, v)

    def need(self, v: Table) -> Any:
        """need(x) of equation (2)."""
        smem = self.smem(v)
        return np.maximum(
            smem - self.chip.block_smem_bytes,
            v["resident"] * (smem + SYSTEM_BYTES) - self.chip.smem_bytes,
        )


def plan_tiles(
    op: Tiled,
    *,
    on: Device,
    space: Space = WHOLE,
    explain: bool = True,
    time_limit_s: float = math.inf,
    gap_frac: float = 0.0,
) -> TilePlan:
    """The optimum of (1); `explain=False` leaves out what other limits would be worth.

    Listing ends after `time_limit_s`, though not before one kernel is found, or within `gap_frac`
    of the bound: then the status is "feasible". Raises `InfeasibleError` with the limits in
    conflict where no tile fits.

    >>> from hwmodels import catalog
    >>> plan = plan_tiles(Matmul(m=8192, n=8192, k=8192), on=catalog.device("h100-sxm"))
    >>> plan.status, plan.gap_frac, plan.best.seconds == plan.seconds_with(0)
    ('optimal', 0.0, True)
    """
    start = time.perf_counter()
    problem = _problem(op, on, space)
    listed = _listed(problem, start + time_limit_s, gap_frac)
    table, seconds, need = listed.table, listed.seconds, listed.need
    _, parts = problem.seconds(table)
    order = _order(problem, table, seconds)
    allowed = order[need[order] <= 0]
    best = _kernel(problem, table, seconds, parts, int(allowed[0]))
    return TilePlan(
        op=op, chip=problem.chip, best=best,
        runners_up=_runners_up(problem, table, seconds, parts, allowed, best),
        bindings=_bindings(problem, best) if explain and listed.complete else (),
        curve=_curve(table, seconds, need, order),
        program=choice_program(problem, table, seconds),
        num_kernels=len(allowed), solve_s=time.perf_counter() - start,
        source=problem.speeds.source,
        bound_s=best.seconds if listed.complete else min(listed.bound_s, best.seconds),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listed:
    """Kernels with their seconds and needs; `complete`: there are no others."""

    table: Table
    seconds: Floats
    need: Any
    complete: bool
    bound_s: float


def _listed(problem: _Problem, until: float, wanted_gap_frac: float) -> _Listed:
    """All kernels up to the headroom, or those of the first tiles until time or gap is reached."""
    rules = problem.rules(Chip.of(problem.chip.device, HEADROOM_BYTES))
    first, *_ = rules.domains
    values = sorted(rules.domains[first], key=lambda v: (abs(math.log2(v / USUAL_ROWS)), v))
    bound = least_seconds(problem.op, problem.speeds)
    tables: list[Table] = []
    best, left = math.inf, len(values)
    for value in values:
        part = solve(replace(rules, domains={**rules.domains, first: [value]})).table
        left -= 1
        if len(part[first]):
            tables.append(part)
            allowed = problem.need(part) <= 0
            best = min(best, float(np.min(problem.seconds(part)[0], where=allowed, initial=best)))
        near = bool(wanted_gap_frac) and gap_frac(best, bound) <= wanted_gap_frac
        if math.isfinite(best) and (near or time.perf_counter() > until):
            break
    if not math.isfinite(best):
        raise InfeasibleError(_why_not(problem))
    table = {name: np.concatenate([t[name] for t in tables]) for name in rules.domains}
    return _Listed(
        table=table, seconds=problem.seconds(table)[0], need=problem.need(table),
        complete=not left, bound_s=bound,
    )  # fmt: skip


def timed(op: Tiled, values: Mapping[str, int], *, on: Device) -> Kernel | None:
    """The kernel with those tiles, the rest of its variables at their best; None: none fits."""
    problem = _problem(op, on, WHOLE)
    table = solve(problem.rules(problem.chip)).table
    keep = np.ones(len(next(iter(table.values()))), dtype=bool)
    for name, value in values.items():
        keep &= table[name] == value
    if not keep.any():
        return None
    held = {name: column[keep] for name, column in table.items()}
    seconds, parts = problem.seconds(held)
    return _kernel(problem, held, seconds, parts, int(_order(problem, held, seconds)[0]))


def _problem(op: Tiled, on: Device, space: Space) -> _Problem:
    if type(op) not in SHAPES:
        raise UnsupportedError(f"tiles: no program for {op.name}; give a matmul or attention")
    sizes = [
        getattr(op, name) for name in ("m", "n", "k", "len_q", "head_dim") if hasattr(op, name)
    ]
    if not all(map(is_scalar, sizes)):
        raise InputError("tiles: one shape at a time; give single sizes")
    dtype = op.computed_dtype if isinstance(op, Matmul) else op.dtype
    if on.matmul_rate_flops_per_s(dtype)[1] != "tensor" or op.dtype.bits not in BITS:
        raise UnsupportedError(
            f"tiles: no program for {op.dtype} on {on.id}; take bf16, fp16, tf32, fp8 or int8 "
            "where it has matrix units for them"
        )
    if dtype != op.dtype and dtype.bits != op.dtype.bits:
        raise UnsupportedError(
            f"tiles: {op.dtype} stored and {dtype} computed is not in the program; store {dtype}"
        )
    chip = Chip.of(on)
    return _Problem(op=op, chip=chip, space=space, speeds=Speeds.of(op, chip))


def _order(problem: _Problem, table: Table, seconds: Floats) -> Any:
    """Rows from the best on; equal seconds by shared memory, then by the variables."""
    rounded = np.round(np.log(seconds) / TIE_FRAC)
    keys = [*reversed([*table.values()]), problem.smem(table), rounded]
    return np.lexsort(keys)


def _kernel(problem: _Problem, table: Table, seconds: Floats, parts: Times, i: int) -> Kernel:
    row = {name: int(column[i]) for name, column in table.items()}
    whole = {name: np.broadcast_to(part, seconds.shape) for name, part in parts.items()}
    return Kernel(
        values=row, seconds=float(seconds[i]),
        parts={name: float(part[i]) for name, part in whole.items()},
        smem_bytes=int(problem.smem(row)), registers=int(problem.registers(row)),
    )  # fmt: skip


def _runners_up(
    problem: _Problem, table: Table, seconds: Floats, parts: Times, order: Any, best: Kernel
) -> tuple[RunnerUp, ...]:
    """The best kernels of the next tiles, one for each tile."""
    names = SHAPES[type(problem.op)]
    keys = np.stack([table[name][order] for name in names])
    _, first = np.unique(keys, axis=1, return_index=True)
    found = []
    for place in sorted(first)[1 : RUNNERS_UP + 1]:
        kernel = _kernel(problem, table, seconds, parts, int(order[place]))
        slower = kernel.seconds / best.seconds - 1
        found.append(RunnerUp(kernel=kernel, slower_frac=slower, reason=_lost(kernel, best)))
    return tuple(found)


def _lost(kernel: Kernel, best: Kernel) -> str:
    """The part that grew most, in words; idle SMs where whole waves explain the loop's growth."""
    if kernel.seconds <= best.seconds * (1 + 1e-6):
        return "as fast; takes more shared memory or larger tiles"
    there, here = _shown(kernel.parts), _shown(best.parts)
    grown = {name: there[name] - here[name] for name in PARTS}
    part = max(grown, key=lambda name: grown[name])
    idle = kernel.parts["idle"] - best.parts["idle"]
    if part == "loop" and idle > 0.01:
        return f"whole waves leave {kernel.parts['idle']:.1%} of the SMs idle"
    words = {
        "loop": "its loop over k or keys takes longer", "epilogue": "writing results shows",
        "memory": "moves more of device memory", "adding parts": "adding parts of k",
        "start": "starts later",
    }  # fmt: skip
    return f"{words[part]} (+{grown[part] / best.seconds:.1%} of the time)"


def _shown(parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the parts as they add up: of device memory, what the SMs' time does not hide."""
    memory = overlap(parts["SMs"], parts["memory"]) - parts["SMs"]
    return {name: parts.get(name, 0.0) for name in PARTS} | {"memory": float(memory)}


def _curve(
    table: Table, seconds: Floats, need: Any, order: Any
) -> tuple[CurvePoint, ...]:  # fmt: skip
    """Equation (2): the steps of the staircase."""
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    by_need = np.lexsort((ranks, need))
    found: list[CurvePoint] = []
    best = np.inf
    lowest = np.minimum.accumulate(seconds[by_need])
    for place in np.flatnonzero(np.diff(lowest, prepend=np.inf) < 0):
        i = by_need[place]
        if seconds[i] >= best * (1 - TIE_FRAC):
            continue
        best = float(seconds[i])
        if found and found[-1].more_smem_bytes == need[i]:
            found.pop()
        found.append(CurvePoint(
            more_smem_bytes=int(need[i]), seconds=best,
            values={name: int(column[i]) for name, column in table.items()},
        ))  # fmt: skip
    return tuple(found)


def _bindings(problem: _Problem, best: Kernel) -> tuple[Binding, ...]:
    """Equation (3), the dearest limit first; both limits of shared memory count as one."""
    rules = problem.rules(problem.chip)
    names = [c.name for c in rules.constraints if c.resource and c.name not in SHARED]
    found = []
    for label, dropped in [("shared memory", SHARED), *((name, (name,)) for name in names)]:
        table = solve(rules.without(*dropped)).table
        seconds, parts = problem.seconds(table)
        kernel = _kernel(problem, table, seconds, parts, int(_order(problem, table, seconds)[0]))
        gain = 1 - kernel.seconds / best.seconds
        if gain > TIE_FRAC:
            found.append(Binding(limit=label, gain_frac=gain, kernel=kernel))
    return tuple(sorted(found, key=lambda one: -one.gain_frac))


def _why_not(problem: _Problem) -> str:
    """The limits of the smallest tile: which of them it breaks, and by how much."""
    rules = problem.rules(problem.chip)
    smallest = {name: np.array([min(domain)]) for name, domain in rules.domains.items()}
    broken = [c for c in rules.constraints if c.resource and not c.holds(smallest).all()]
    whole = [c for c in broken if c.name in (SMEM, REGISTERS, TENSOR_MEMORY)] or broken
    where = f"{problem.op.name} on {problem.chip.device.id}"
    if not whole:
        names = [c.name for c in rules.constraints if not c.resource]
        return f"no tile of {where} is in {' and '.join(names)}; widen the space"
    words = [
        f"{c.name} ({int(np.max(c.left(smallest))):,} for the smallest tile of "
        f"{int(np.max(c.right(smallest))):,})"
        for c in whole
    ]
    return f"no tile of {where} fits: {' and '.join(words)}; take narrower heads or split them"


def choice_program(problem: _Problem, table: Table, seconds: Floats) -> Program:
    """One of the points none of which is beaten in seconds and in all needs by another: as rows.

    min sum T_i y_i   s.t.  sum y_i = 1,  sum need_i y_i <= limit,  y whole
    """
    chip = problem.chip
    smem = problem.smem(table)
    needs = np.stack([smem, table["resident"] * (smem + SYSTEM_BYTES)])
    kept = _undominated(seconds, needs)
    names = [_label(table, int(i)) for i in kept]
    limits = ((SMEM, chip.block_smem_bytes), (SMEM_SM, chip.smem_bytes))
    rows = [Row("one kernel", dict.fromkeys(names, 1.0), EQUAL, 1.0)]
    for (name, limit), need in zip(limits, needs, strict=True):
        terms = {one: float(need[i]) / KIB for one, i in zip(names, kept, strict=True)}
        rows.append(Row(f"{name}, KiB", terms, AT_MOST, limit / KIB))
    return Program(
        name=f"tiles of {problem.op.name}, microseconds",
        variables=tuple(Variable(one, upper=1.0, whole=True) for one in names),
        rows=tuple(rows),
        objective={one: float(seconds[i]) * 1e6 for one, i in zip(names, kept, strict=True)},
    )


def _undominated(seconds: Floats, needs: Any) -> list[int]:
    """Points in the order of time; each needs less of something than all faster ones."""
    order = np.lexsort((needs[1], needs[0], seconds))
    kept: list[int] = []
    open_ = np.ones(len(order), dtype=bool)
    while open_.any():
        place = int(np.argmax(open_))
        i = int(order[place])
        kept.append(i)
        open_ &= ~np.all(needs[:, order] >= needs[:, [i]], axis=0)
    return kept


def _label(table: Table, i: int) -> str:
    """A name from all variables: the tile, then the initials of the others with their values."""
    row = {name: int(column[i]) for name, column in table.items()}
    tile = "x".join(str(value) for name, value in row.items() if name.startswith("tile"))
    rest = (
        "".join(word[0] for word in name.split("_")) + (name[-1:] if name == "splits" else "")
        + str(value)
        for name, value in row.items()
        if not name.startswith("tile")
    )  # fmt: skip
    return "_".join([f"t{tile}", *rest])

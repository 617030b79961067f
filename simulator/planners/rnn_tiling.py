"""How a persistent recurrent kernel is tiled over a device: FlashRNN's integer constraints.

A head of H units keeps its recurrent matrix on the chip for all time steps. The product of a step
has K rows in (forward: the H units; backward: the G H gates) and N columns out (forward: G H;
backward: H). Thread blocks of one SM each take N / r_out columns and K / r_in rows of it; they
must all be resident at once, since they wait for each other every step.

**Committed rules** (`committed_rules`): autotune/tune.rules and constrint_test.constrint, weights
in shared memory. B sequences in b_blocks parts, warp tiles of 8 sequences, t_out = 32 columns
(backward 32 units) and t_in = 16 rows, e = 2 B weights, 4 B sums, p = 8 padding:

    r_in | K,  r_out | N,  r_out 32 | N,  w_in | K,  16 | H                                     (1)
    N w_in <= threads r_out                                                                     (2)
    w_batch 8 b_blocks = B                                                                      (3)
    blocks = r_out r_in b_blocks <= SMs                                                         (4)
    e G b_blocks H^2 + e N b_blocks p + 4 r_in b_blocks (N + p) <= smem blocks                  (5)

**Released rules** (`released_rules`): flashrnn.py of the published package. Weights also in
registers (`cached` fragments of 16 rows a warp), heads side by side, loops over columns and
sequences, a quarter of the threads; w warps a block take the columns and rows, w_batch times:

    t_batch t_out = 256,  w r_out l_out t_out = w_in N                                          (6)
    r_in w_in 16 | K,  r_out l_out t_out | N,  heads_beside | heads                             (7)
    w_batch b_blocks l_batch t_batch | B,  l_batch <= 4,  32 w w_batch <= threads / 4           (8)
    blocks = heads_beside r_out r_in b_blocks <= SMs                                            (9)
    r_in cached w_in 16 <= K,  registers R = 16 t_out cached w                                 (10)
    R + 256 w w_batch l_batch a / e + 16 w w_batch t_batch <= registers of an SM / e           (11)
    e R b_blocks r_in r_out < weights = e b_blocks (G H^2 + N p) + 64                          (12)
    weights + a w_in r_in w_batch b_blocks l_batch t_batch (N + r_out p)
        <= (smem r_in r_out + e R r_in r_out) b_blocks                                          (13)

H may be padded up in both: the least feasible H >= the wanted one is taken. Solved exhaustively
(`integers.solve`), so that infeasible is proven; `solve_milp` agrees (tests). Source: arXiv
2412.07752, section 4, and the files named, of NX-AI/flashrnn.

    Implemented in: `_committed_tiles` (1, 3), `_committed_hardware` (2, 4, 5), `_Released.tiles`
    (6, 7, 8), `.threading` (8, 9), `.storage` (10-13), `plan_rnn_tiling` (padding, the way out),
    `largest_head_dim`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InfeasibleError, InputError, UnknownNameError
from simulator.planners.integers import (
    DIVIDES,
    EQUAL,
    LARGEST,
    SMALLEST,
    Constraint,
    Program,
    binding,
    solve,
)

FORWARD, BACKWARD = "forward", "backward"
DIRECTIONS: Final = (FORWARD, BACKWARD)
COMMITTED, RELEASED = "committed", "released"

WARP: Final = 32
PADDING: Final = 8
"""Elements between rows in shared memory, against bank conflicts."""
TILE_BATCH, TILE_OUT, TILE_IN = 8, 32, 16
TILE_AREA: Final = 256
"""Sequences times columns of one matrix instruction."""
TILES: Final = (8, 16, 32)
MOST_LOOPS: Final = 4
THREAD_SHARE: Final = 4
"""The released kernel takes a quarter of a block's threads, which leaves more registers to each."""
RESERVED_BYTES: Final = 1024
MOST_SMEM_BYTES: Final = 227_000
"""What a block may opt into, less what the driver keeps; the released package's limit."""
SPARE_BYTES: Final = 64
SUM_BYTES: Final = 4
STEP: Final = 16
"""Heads are padded to a multiple of it: the rows of a matrix instruction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a device allows a kernel of one block an SM; bytes of shared memory of one block."""

    num_sms: int
    smem_bytes: int
    register_bytes: int = 65536 * 4
    max_threads: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is to be tiled: heads of `head_dim` units with `gates` recurrent gates.

    `dtype` is the format of the weights: 16 bits, or fp32 (which multiplies as tf32).
    """

    head_dim: int
    num_heads: int = 1
    gates: int = 4
    batch: int = 8
    dtype: DType = BF16

    def __post_init__(self) -> None:
        sizes = {
            "head_dim": self.head_dim, "num_heads": self.num_heads,
            "gates": self.gates, "batch": self.batch,
        }  # fmt: skip
        for name, value in sizes.items():
            if value != int(value) or value < 1:
                raise InputError(f"rnn tiling: {name} = {value} must be a whole number from 1")
        if self.dtype.bits not in (16, 32):
            raise InputError(f"rnn tiling: no kernel for {self.dtype}; take bf16, fp16 or fp32")

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight."""
        return self.dtype.bits // 8

    @property
    def padded_batch(self) -> int:
        """Sequences in whole warp tiles."""
        tile = 2 * TILE_BATCH if self.dtype == FP32 else TILE_BATCH
        return math.ceil(self.batch / tile) * tile


@dataclass(frozen=True, slots=True, kw_only=True)
class RnnTiling:
    """A feasible tiling: the padded head, the counts by name, blocks, and their shared memory."""

    layer: Layer
    direction: str
    head_dim: int
    values: Mapping[str, int]
    num_blocks: int
    num_solutions: int


def limits_of(device: Device) -> Limits:
    """The limits of a catalogue device, as the released package asks the driver for them."""
    registers = device.sm.register_file_bytes
    smem = device.sm.smem_bytes_per_block or device.sm.smem_bytes
    private = [level for level in device.memory[:-1] if level.num_units > 1]
    if smem is None:
        smem = int(private[-1].capacity_bytes) if private else 0
    if registers is None:
        registers = int(private[0].capacity_bytes) if len(private) > 1 else 0
    return Limits(
        num_sms=device.num_sms,
        smem_bytes=max(min(int(smem) - RESERVED_BYTES, MOST_SMEM_BYTES), 0),
        register_bytes=int(registers),
        max_threads=int(device.sm.max_threads_per_block or 1024),
    )


def committed_rules(
    layer: Layer, limits: Limits, direction: str = FORWARD, *, batch_blocks: tuple[int, ...] = (1,)
) -> Program:
    """Equations (1) to (5) for one head, already padded."""
    most = limits.num_sms
    return Program(
        domains={
            "b_blocks": batch_blocks,
            "w_batch": range(1, max(layer.batch // TILE_BATCH, 1) + 1),
            "r_out": range(1, most + 1),
            "r_in": range(1, most + 1),
            "w_in": range(1, limits.max_threads // WARP + 1),
        },
        constraints=(
            *_committed_tiles(layer, direction),
            *_committed_hardware(layer, limits, direction),
        ),
        prefer={"r_in": SMALLEST, "r_out": LARGEST, "w_in": LARGEST},
    )


def _committed_tiles(layer: Layer, direction: str) -> Iterator[Constraint]:
    """Equations (1) and (3)."""
    rows, columns = _product(layer, direction)
    yield _tiles("whole rows of the head", ("r_in",), rows, lambda v: v["r_in"])
    yield _tiles("whole warp tiles", ("r_out",), columns, lambda v: v["r_out"] * TILE_OUT)
    yield _tiles("whole rows of a warp", ("w_in",), rows, lambda v: v["w_in"])
    yield _tiles("whole matrix instructions", ("r_in",), layer.head_dim, lambda v: TILE_IN)
    yield Constraint(
        name="whole tiles of the batch", uses=("w_batch", "b_blocks"), relation=EQUAL,
        left=lambda v: v["w_batch"] * TILE_BATCH * v["b_blocks"], right=lambda v: layer.batch,
    )  # fmt: skip


def _committed_hardware(layer: Layer, limits: Limits, direction: str) -> Iterator[Constraint]:
    """Equations (2), (4) and (5)."""
    h, e = layer.head_dim, layer.element_bytes
    _, columns = _product(layer, direction)
    weights = e * (layer.gates * h**2 + columns * PADDING)
    padded = columns + PADDING * (columns // h)
    blocks = ("r_out", "r_in", "b_blocks")
    yield Constraint(
        name="threads of a block", uses=("r_out", "w_in"), resource=True,
        left=lambda v: columns * v["w_in"], right=lambda v: limits.max_threads * v["r_out"],
    )  # fmt: skip
    yield Constraint(
        name="number of SMs", uses=blocks, resource=True, right=lambda v: limits.num_sms,
        left=lambda v: v["r_out"] * v["r_in"] * v["b_blocks"],
    )  # fmt: skip
    yield Constraint(
        name="shared memory", uses=blocks, resource=True,
        left=lambda v: v["b_blocks"] * (weights + SUM_BYTES * v["r_in"] * padded),
        right=lambda v: limits.smem_bytes * v["r_out"] * v["r_in"] * v["b_blocks"],
    )  # fmt: skip


def released_rules(layer: Layer, limits: Limits, direction: str = FORWARD) -> Program:
    """Equations (6) to (13) for heads of one size, already padded."""
    kernel = _Released.of(layer, limits, direction)
    rows, columns, most = kernel.rows, kernel.columns, limits.num_sms
    warps = kernel.threads // WARP
    return Program(
        domains={
            "heads_beside": _divisors(layer.num_heads, most),
            "r_out": _divisors(columns, most),
            "r_in": _divisors(rows, most),
            "b_blocks": _divisors(layer.padded_batch, most),
            "t_out": TILES if layer.dtype.bits == 16 else TILES[1:2],
            "l_out": _divisors(columns, columns),
            "w_in": _divisors(rows, warps),
            "warps": range(1, warps + 1),
            "w_batch": _divisors(layer.padded_batch, warps),
            "l_batch": range(1, MOST_LOOPS + 1),
            "cached": range(rows // kernel.depth + 1),
        },
        constraints=(*kernel.tiles(), *kernel.threading(), *kernel.storage()),
        prefer={
            "t_out": SMALLEST, "heads_beside": LARGEST, "r_out": LARGEST, "r_in": SMALLEST,
            "b_blocks": LARGEST, "l_batch": LARGEST, "l_out": SMALLEST, "w_in": LARGEST,
            "w_batch": LARGEST, "cached": LARGEST,
        },
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Released:
    """The released kernel's constraints on one product of `rows` by `columns`; matrix instructions
    are `depth` rows deep."""

    layer: Layer
    limits: Limits
    rows: int
    columns: int
    depth: int
    threads: int

    @staticmethod
    def of(layer: Layer, limits: Limits, direction: str) -> _Released:
        rows, columns = _product(layer, direction)
        return _Released(
            layer=layer, limits=limits, rows=rows, columns=columns,
            depth=TILE_IN if layer.dtype.bits == 16 else TILE_IN // 2,
            threads=limits.max_threads // THREAD_SHARE,
        )  # fmt: skip

    def registers(self, v: Mapping[str, Any]) -> Any:
        """Weights that a block's registers hold, in elements: R of equation (10)."""
        return self.depth * v["t_out"] * v["cached"] * v["warps"]

    def weights(self, v: Mapping[str, Any]) -> Any:
        """Bytes of a head's weights in all its blocks, rows padded."""
        matrix = self.layer.gates * self.layer.head_dim**2 + self.columns * PADDING
        return self.layer.element_bytes * v["b_blocks"] * matrix + SPARE_BYTES

    def sequences(self, v: Mapping[str, Any]) -> Any:
        """Sequences that all blocks carry at once."""
        return v["w_batch"] * v["b_blocks"] * v["l_batch"] * (TILE_AREA // v["t_out"])

    def tiles(self) -> Iterator[Constraint]:
        """Equations (6) and (7), and the batch's part of (8)."""
        columns, rows = self.columns, self.rows
        yield _tiles(
            "whole warp tiles", ("r_out", "t_out", "l_out"), columns,
            lambda v: v["r_out"] * v["t_out"] * v["l_out"],
        )  # fmt: skip
        yield _tiles(
            "whole rows of a warp", ("r_in", "w_in"), rows,
            lambda v: v["r_in"] * v["w_in"] * self.depth,
        )  # fmt: skip
        yield _tiles(
            "whole tiles of the batch", ("b_blocks", "t_out", "w_batch", "l_batch"),
            self.layer.padded_batch, self.sequences,
        )  # fmt: skip
        yield Constraint(
            name="whole warps", uses=("r_out", "t_out", "l_out", "w_in", "warps"), relation=EQUAL,
            left=lambda v: v["warps"] * v["r_out"] * v["l_out"] * v["t_out"],
            right=lambda v: v["w_in"] * columns,
        )  # fmt: skip

    def threading(self) -> Iterator[Constraint]:
        """Equation (9), and the threads' part of (8)."""
        yield Constraint(
            name="number of SMs", uses=("heads_beside", "r_out", "r_in", "b_blocks"),
            left=lambda v: v["heads_beside"] * v["r_out"] * v["r_in"] * v["b_blocks"],
            right=lambda v: self.limits.num_sms, resource=True,
        )  # fmt: skip
        yield Constraint(
            name="threads of a block", uses=("warps", "w_batch"), resource=True,
            left=lambda v: WARP * v["warps"] * v["w_batch"], right=lambda v: self.threads,
        )  # fmt: skip

    def storage(self) -> Iterator[Constraint]:
        """Equations (10) to (13)."""
        e, blocks = self.layer.element_bytes, ("r_in", "r_out", "b_blocks")
        yield Constraint(
            name="rows to cache", uses=("r_in", "w_in", "cached"), right=lambda v: self.rows,
            left=lambda v: v["r_in"] * v["cached"] * v["w_in"] * self.depth,
        )  # fmt: skip
        yield Constraint(
            name="registers", uses=("t_out", "warps", "w_batch", "l_batch", "cached"),
            left=lambda v: self.registers(v) + v["warps"] * v["w_batch"] * self._fragments(v),
            right=lambda v: self.limits.register_bytes // e, resource=True,
        )  # fmt: skip
        yield Constraint(
            name="weights to cache", uses=(*blocks, "t_out", "warps", "cached"),
            left=lambda v: e * self.registers(v) * v["b_blocks"] * v["r_in"] * v["r_out"] + 1,
            right=self.weights,
        )  # fmt: skip
        yield Constraint(
            name="shared memory", resource=True,
            uses=(*blocks, "t_out", "w_in", "warps", "w_batch", "l_batch", "cached"),
            left=lambda v: self.weights(v) + self._sums(v),
            right=lambda v: v["b_blocks"] * v["r_in"] * v["r_out"]
            * (self.limits.smem_bytes + e * self.registers(v)),
        )  # fmt: skip

    def _fragments(self, v: Mapping[str, Any]) -> Any:
        """Elements of a warp's sums and of its piece of the state."""
        sums = TILE_AREA * v["l_batch"] * (SUM_BYTES // self.layer.element_bytes)
        return sums + self.depth * (TILE_AREA // v["t_out"])

    def _sums(self, v: Mapping[str, Any]) -> Any:
        """Bytes of the warps' parts of the product, in all blocks of a head."""
        padded = self.columns + v["r_out"] * PADDING
        return SUM_BYTES * v["w_in"] * v["r_in"] * self.sequences(v) * padded


def plan_rnn_tiling(
    layer: Layer,
    *,
    on: Device | Limits,
    direction: str = FORWARD,
    rules: str = RELEASED,
) -> RnnTiling:
    """The authors' preferred tiling of the least padded head that fits.

    Raises `InfeasibleError` with the limits that bind and the way out where none does.

    >>> a100 = Limits(num_sms=108, smem_bytes=165_000)
    >>> choice = plan_rnn_tiling(Layer(head_dim=2912, gates=1), on=a100, rules="committed")
    >>> choice.values["r_out"], choice.values["r_in"], choice.num_blocks
    (13, 8, 104)
    """
    limits = on if isinstance(on, Limits) else limits_of(on)
    build = _rules(rules, direction)
    for head in _padded(layer, limits):
        answer = solve(build(_of(layer, head), limits, direction))
        if answer.feasible:
            values = answer.first()
            return RnnTiling(
                layer=layer, direction=direction, head_dim=head, values=values,
                num_blocks=_blocks(values), num_solutions=answer.num_solutions,
            )  # fmt: skip
    raise InfeasibleError(_why_not(layer, limits, direction, rules, on))


def largest_head_dim(
    layer: Layer,
    *,
    on: Device | Limits,
    directions: tuple[str, ...] = (FORWARD,),
    rules: str = RELEASED,
) -> int:
    """The largest head (a multiple of 16) that fits in all those directions; 0: none does."""
    limits = on if isinstance(on, Limits) else limits_of(on)
    return _largest(_of(layer, 1), limits, directions, rules)


@lru_cache(maxsize=256)
def _largest(layer: Layer, limits: Limits, directions: tuple[str, ...], rules: str) -> int:
    for head in range(_ceiling(layer, limits), 0, -STEP):
        sized = _of(layer, head)
        if all(solve(_rules(rules, d)(sized, limits, d)).feasible for d in directions):
            return head
    return 0


def _rules(rules: str, direction: str) -> Callable[[Layer, Limits, str], Program]:
    known = {COMMITTED: committed_rules, RELEASED: released_rules}
    if rules not in known:
        raise UnknownNameError("rule set", rules, list(known))
    if direction not in DIRECTIONS:
        raise UnknownNameError("rnn direction", direction, list(DIRECTIONS))
    found: Callable[[Layer, Limits, str], Program] = known[rules]
    return found


def _of(layer: Layer, head: int) -> Layer:
    return Layer(
        head_dim=head, num_heads=layer.num_heads, gates=layer.gates, batch=layer.batch,
        dtype=layer.dtype,
    )  # fmt: skip


def _product(layer: Layer, direction: str) -> tuple[int, int]:
    """Rows in and columns out of one head's product."""
    units, gates = layer.head_dim, layer.head_dim * layer.gates
    return (units, gates) if direction == FORWARD else (gates, units)


def _padded(layer: Layer, limits: Limits) -> Iterator[int]:
    """Heads that hold the wanted one, up to what all memory of the chip could hold."""
    start = math.ceil(layer.head_dim / STEP) * STEP
    return iter(range(start, _ceiling(layer, limits) + 1, STEP))


def _ceiling(layer: Layer, limits: Limits) -> int:
    """No head beyond has weights that shared memory and registers of all SMs hold."""
    held = limits.num_sms * (limits.smem_bytes + limits.register_bytes)
    return int(math.sqrt(held / (layer.gates * layer.element_bytes))) // STEP * STEP


def _tiles(
    name: str, uses: tuple[str, ...], size: int, tile: Callable[[Mapping[str, Any]], Any]
) -> Constraint:
    return Constraint(name=name, uses=uses, relation=DIVIDES, left=lambda v: size, right=tile)


def _divisors(number: int, most: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _blocks(values: Mapping[str, int]) -> int:
    return math.prod(values.get(name, 1) for name in ("heads_beside", "r_out", "r_in", "b_blocks"))


def binding_limits(
    layer: Layer,
    head_dim: int,
    *,
    on: Device | Limits,
    direction: str = FORWARD,
    rules: str = RELEASED,
) -> tuple[str, ...]:
    """What a head that does not fit runs into: hardware limits where they explain it alone."""
    limits = on if isinstance(on, Limits) else limits_of(on)
    head = math.ceil(head_dim / STEP) * STEP
    program = _rules(rules, direction)(_of(layer, head), limits, direction)
    hardware = {c.name for c in program.constraints if c.resource}
    names = binding(program)
    return tuple(n for n in names if n in hardware)[:2] or names[:2]


def _why_not(layer: Layer, limits: Limits, direction: str, rules: str, on: Device | Limits) -> str:
    """What binds the least padded head, and into how many heads the width would fit."""
    where = on.id if isinstance(on, Device) else f"{limits.num_sms} SMs"
    names = binding_limits(layer, layer.head_dim, on=limits, direction=direction, rules=rules)
    largest = _largest(_of(layer, 1), limits, (direction,), rules)
    text = (
        f"no {direction} tiling of a head of {layer.head_dim} units with {layer.gates} gates on "
        f"{where}: {' and '.join(names)} ({limits.num_sms} SMs, {limits.smem_bytes} B of shared "
        f"memory each) allow {largest} at most"
    )
    parts = _heads_that_fit(layer, largest)
    if parts:
        return f"{text}; split the width into {parts} heads, or alternate two kernels a step"
    return f"{text}; alternate two kernels a step"


def _heads_that_fit(layer: Layer, largest: int) -> int | None:
    """The least number of heads of equal size that the width divides into and that fit."""
    width = layer.head_dim * layer.num_heads
    if not largest:
        return None
    fits = (n for n in range(layer.num_heads + 1, width + 1) if width % n == 0)
    return next((n for n in fits if width // n <= largest), None)

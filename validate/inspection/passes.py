"""Machine-code loops matched with the source's, so that trip counts say how often each runs.

The source's loops (TTIR) and the machine code's are paired when they nest alike and compute alike;
else leaf by leaf, where Triton flattened a nest into one loop or ptxas kept a path of its own for
no passes at all; else where ptxas unrolled the one loop there is. Anything else is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hwmodels.errors import InputError
from simulator.instruction_issue import GROUPED, TENSOR_MEMORY, WARP_WIDE, Body, warp_flops
from simulator.occupancy import WARP
from validate.inspection.binary import Inspection
from validate.inspection.sass import Loop
from validate.inspection.source import SourceLoop

_LOADS: Final = ("LDG", "LDGSTS", "UTMALDG", "LD", "UBLKCP")
_FORMATS: Final = {"QGMMA": "fp8", "QMMA": "fp8", "IGMMA": "int8", "IMMA": "int8", "DMMA": "fp64"}
TENSOR: Final = (*GROUPED, *WARP_WIDE, *TENSOR_MEMORY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Bodies of code with how often each runs, and what was assumed on the way."""

    bodies: tuple[Body, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    loop: Loop
    source: int
    unrolled: float = 1.0
    flat: bool = False


def loop_lines(found: Inspection) -> str:
    """The source's loops in words, in the order in which trips are given."""
    loops = found.source[1:]
    return ", ".join(
        f"{'  ' * x.depth}line {x.line}" if x.line else f"loop {n}"
        for n, x in enumerate(loops, start=1)
    ).replace("  ", "inner ")  # fmt: skip


def passes(found: Inspection, trips: Sequence[float]) -> Passes:
    """Bodies of a compiled kernel for the passes of each source loop, in the source's order.

    Raises `InputError`, one line, where trips are missing or loops cannot be told apart.
    """
    loops = found.source[1:]
    if len(trips) != len(loops):
        have = f"{len(loops)} loop{'s' if len(loops) != 1 else ''}"
        where = f" ({loop_lines(found)})" if loops else ""
        raise InputError(
            f"trip counts are unknown: the kernel has {have}{where}, {len(trips)} trip counts were "
            "given; give --trip once for each loop in this order"
        )
    runs = _runs(found.source, trips)
    pairs, unpaired = _pairs(found)
    notes = [
        f"a loop of the machine code ({sum(x.counts.values())} instructions) has no counterpart in "
        "the source and is taken as not run"
        for x in unpaired
    ]
    if found.num_warps != found.plain_warps:
        notes.append(
            "warps are specialised: every warp is counted with all the code, an upper bound"
        )
    in_memory = any(kind in TENSOR_MEMORY for kind in found.code.counts)
    if in_memory:
        notes.append("products in tensor memory: flops from the source, not the instructions")
    machine = [_machine(p, runs, trips, in_memory) for p in pairs]
    stated = [_stated(x, n, in_memory) for x, n in zip(found.source, runs, strict=True)]
    return Passes(
        bodies=(_outside(found, in_memory), *machine, *stated), notes=tuple(dict.fromkeys(notes))
    )


def _runs(source: Sequence[SourceLoop], trips: Sequence[float]) -> list[float]:
    """How often each source loop's body runs in one block; once around all."""
    runs = [1.0]
    for loop, trip in zip(source[1:], trips, strict=True):
        runs.append(trip * runs[loop.outer or 0])
    return runs


def _stated(loop: SourceLoop, runs: float, in_memory: bool) -> Body:
    """What the source says a pass moves (and, in tensor memory, multiplies)."""
    return Body(
        counts={}, always={}, passes=runs, load_bytes=loop.load_bytes,
        store_bytes=loop.store_bytes, tensor_flops=loop.dot_flops if in_memory else 0.0,
        math=loop.math or "bf16",
    )  # fmt: skip


def _machine(
    pair: _Pair, runs: Sequence[float], trips: Sequence[float], in_memory: bool
) -> Body:  # fmt: skip
    counts, always = (_kept(x, in_memory) for x in (pair.loop.counts, pair.loop.always))
    trip = max(trips[pair.source - 1], 1.0)
    return Body(
        counts=counts, always=always, passes=runs[pair.source] / pair.unrolled,
        math=_format(counts), maybe_share=1 / trip if pair.flat else 1.0,
    )  # fmt: skip


def _outside(found: Inspection, in_memory: bool) -> Body:
    """What stands around all loops: once, at most."""
    left = Counter(found.code.counts)
    for loop in found.code.loops or ():
        left.subtract(loop.counts)
    counts = _kept({k: n for k, n in left.items() if n > 0}, in_memory)
    return Body(counts=counts, always={}, passes=1.0, math=_format(counts))


def _kept(counts: Mapping[str, int], in_memory: bool) -> Mapping[str, int]:
    """Counts without products that the source already stands for."""
    if not in_memory:
        return counts
    return {k: n for k, n in counts.items() if k.split(".")[0] not in WARP_WIDE}


def _format(counts: Mapping[str, int]) -> str:
    """The format that the matrix instructions of a body multiply in; bf16 stands for both 16s."""
    for kind in counts:
        base, _, shape = kind.partition(".")
        if base in _FORMATS:
            return _FORMATS[base]
        if (base == "HMMA" and shape in ("1688", "1684")) or (
            base == "HGMMA" and shape.endswith("x8")
        ):
            return "tf32"
    return "bf16"


# ---- pairing -------------------------------------------------------------------------------


def _pairs(found: Inspection) -> tuple[list[_Pair], list[Loop]]:
    """Loops of the machine code with the number of their source loop, and those without one."""
    if found.code.loops is None:
        raise InputError(f"the machine code's loops are unknown: {found.code.why_unknown}")
    work = [x for x in found.code.loops if not x.is_wait]
    source = found.source
    numbers = range(1, len(source))
    alike = [x.depth for x in work] == [source[n].depth for n in numbers]
    if alike and all(_fits(x, source[n]) for x, n in zip(work, numbers, strict=True)):
        return [
            _Pair(loop=x, source=n, unrolled=_unrolled(x, source[n], found))
            for x, n in zip(work, numbers, strict=True)
        ], []
    leaves = [n for n in numbers if all(x.outer != n for x in source)]
    able = [x for x in work if any(_fits(x, source[n]) for n in leaves)]
    if len(able) == len(leaves) and all(
        _fits(x, source[n]) for x, n in zip(able, leaves, strict=True)
    ):
        pairs = [
            _Pair(
                loop=x, source=n, unrolled=_unrolled(x, source[n], found),
                flat=x.depth < source[n].depth,
            )
            for x, n in zip(able, leaves, strict=True)
        ]  # fmt: skip
        return pairs, [x for x in work if x not in able]
    if len(leaves) == 1 and able:
        return _one_leaf(able, leaves[0], found), []
    raise InputError(
        f"the machine code's {len(work)} loops cannot be told apart: the source has "
        f"{len(leaves)} innermost loops; read them with `ridgeplan kernels inspect`"
    )


def _one_leaf(able: Sequence[Loop], leaf: int, found: Inspection) -> list[_Pair]:
    """The widest of the copies that ptxas made of one loop; the others take its remainders."""
    widest = max(able, key=lambda x: sum(x.counts.values()))
    source = found.source[leaf]
    unrolled = _unrolled(widest, source, found)
    if unrolled <= 1 and source.load_bytes:
        least = min(_loads(x) for x in able)
        unrolled = _loads(widest) / least if least else 1.0
    return [_Pair(loop=widest, source=leaf, unrolled=unrolled, flat=widest.depth < source.depth)]


def _fits(loop: Loop, source: SourceLoop) -> bool:
    """Does a machine-code loop compute what a source loop does, as far as can be told?"""
    multiplies = any(kind.split(".")[0] in TENSOR for kind in loop.counts)
    if source.dot_flops and source.math != "fp32":
        return multiplies
    if multiplies:
        return False
    return not source.load_bytes or _loads(loop) > 0


def _unrolled(loop: Loop, source: SourceLoop, found: Inspection) -> float:
    """Source passes in one pass of the machine code.

    From the flops of its products; without any, from its special functions and the bytes of its
    loads, the fewer of the two, and only where the code beside holds copies for the remainder: a
    small load that every warp repeats is no unrolling.
    """
    flops = found.plain_warps * sum(n * warp_flops(kind) for kind, n in loop.counts.items())
    if source.dot_flops:
        return _whole(flops / source.dot_flops)
    threads = WARP * found.plain_warps
    special = sum(n for kind, n in loop.counts.items() if kind.startswith("MUFU"))
    ratios = []
    if source.special_ops:
        ratios.append(threads * special / source.special_ops)
    if source.load_bytes and _load_bytes(loop.counts):
        ratios.append(threads * _load_bytes(loop.counts) / source.load_bytes)
    times = _whole(min(ratios, default=1.0))
    beside = _load_bytes(found.code.counts) - _load_bytes(loop.counts)
    copied = beside * times >= (times - 1) * _load_bytes(loop.counts)
    return times if copied else 1.0


def _whole(ratio: float) -> float:
    return float(round(ratio)) if ratio >= 1.5 else 1.0


def _load_bytes(counts: Mapping[str, int]) -> float:
    """Bytes that one lane's plain loads name."""
    return sum(
        n * int(kind.split(".")[1]) / 8
        for kind, n in counts.items()
        if kind.split(".")[0] in ("LDG", "LDGSTS")
    )


def _loads(loop: Loop) -> int:
    return sum(n for kind, n in loop.counts.items() if kind.split(".")[0] in _LOADS)

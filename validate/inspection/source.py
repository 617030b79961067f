"""Loops of a kernel as Triton's own intermediate code (TTIR) states them, one block a program.

What a pass of each source loop computes and moves is exact there and the same for every
architecture: flops of the matrix products (2 m n k), bytes that loads and stores name before masks
and caches. Bytes are those of the tensors named, so a broadcast pointer counts each result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

_BITS: Final = re.compile(r"^(?:bf|f|i|ui|si)(\d+)|^f8\w*|^fp8\w*")
_TENSOR: Final = re.compile(r"tensor<((?:\d+x)*)([^<>,]+(?:<[^<>]*>)?)[^<>]*>")
_DESCRIBED: Final = re.compile(r"tensordesc<(?:tensor<)?((?:\d+x)+)([A-Za-z0-9]+)")
_DOT: Final = re.compile(r": tensor<([\dx]+)x[^>]*> \* tensor<([\dx]+)x[^>]*> ->")
_OPERAND: Final = re.compile(r": tensor<[\dx]+x([^>,]+)[^>]*> \* ")
_LOADS: Final = ("tt.load ", "tt.descriptor_load ", "tt.descriptor_gather ")
_STORES: Final = (
    "tt.store ", "tt.descriptor_store ", "tt.atomic_rmw ", "tt.descriptor_reduce ",
    "tt.descriptor_scatter ",
)  # fmt: skip
_SPECIAL: Final = (
    "math.exp",
    "math.log",
    "math.sqrt",
    "math.rsqrt",
    "math.sin",
    "math.cos",
    "tanh",
)
_LOC: Final = re.compile(r'^#(loc\w*) = loc\("([^"]*)":(\d+):')
_NAMED: Final = re.compile(r'^#(loc\w*) = loc\((?:"[^"]*"|callsite)\(#(loc\w*)')
_AT: Final = re.compile(r"loc\(#(loc\w*)\)\s*$")


@dataclass(slots=True, kw_only=True)
class SourceLoop:
    """One pass of a loop of one program, inner loops left out; the first is the code around all.

    `line` is where the source begins it (0: unknown); `math` the format that its products
    multiply in ('' without any).
    """

    depth: int
    outer: int | None
    line: int = 0
    dot_flops: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    special_ops: int = 0
    math: str = ""

    def plain(self) -> dict[str, Any]:
        """Its figures without the source line, which comments move: what the record holds."""
        named = ("dot_flops", "load_bytes", "store_bytes", "special_ops", "math")
        figures = {name: getattr(self, name) for name in named if getattr(self, name)}
        return {"depth": self.depth, "outer": self.outer, **figures}

    @staticmethod
    def of(found: Mapping[str, Any]) -> SourceLoop:
        """From what `plain` wrote."""
        return SourceLoop(**found)


@dataclass(slots=True)
class _Reader:
    loops: list[SourceLoop] = field(
        default_factory=lambda: [SourceLoop(depth=-1, outer=None)]
    )  # fmt: skip
    open: list[int | None] = field(default_factory=list)

    @property
    def here(self) -> int:
        """The loop that the next line stands in."""
        return next((x for x in reversed(self.open) if x is not None), 0)


def source_loops(ttir: str) -> tuple[SourceLoop, ...]:
    """The code around all loops first, then every loop in the order of the source."""
    lines = _lines(ttir)
    rows = ttir.splitlines()
    ends = _closings(rows, lines)
    reader = _Reader()
    for at, row in enumerate(rows):
        text = row.strip()
        if text.startswith("}"):
            if reader.open:
                reader.open.pop()
        elif text and not text.startswith("#"):
            _tally(reader.loops[reader.here], text)
        head = text.split(" loc(")[0].rstrip()
        if head.endswith("{") and not text.startswith("#"):
            is_loop = "scf.for " in text or "scf.while" in text
            number: int | None = None
            if is_loop:
                outer = reader.here
                reader.loops.append(
                    SourceLoop(
                        depth=reader.loops[outer].depth + 1, outer=outer or None,
                        line=ends.get(at, 0),
                    )
                )  # fmt: skip
                number = len(reader.loops) - 1
            reader.open.append(number)
    return tuple(reader.loops)


def _tally(loop: SourceLoop, text: str) -> None:
    """Add one operation to the loop that it stands in."""
    if "tt.dot" in text:
        loop.dot_flops += _dot_flops(text)
        loop.math = _math(text) or loop.math
    elif any(name in text for name in _LOADS):
        loop.load_bytes += _moved(text)
    elif any(name in text for name in _STORES):
        loop.store_bytes += _moved(text)
    elif any(name in text for name in _SPECIAL):
        loop.special_ops += _elements(text.rsplit(" : ", 1)[-1])


def _dot_flops(text: str) -> int:
    found = _DOT.search(text)
    if found is None:
        return 0
    a, b = ([int(x) for x in group.split("x")] for group in found.groups())
    batch = a[0] if len(a) == 3 else 1
    return 2 * batch * a[-2] * a[-1] * b[-1]


def _math(text: str) -> str:
    """The format that a product multiplies in, as `hwmodels.dtypes` names it."""
    found = _OPERAND.search(text)
    kind = found[1].strip() if found else ""
    if kind == "f32":
        return "tf32" if "inputPrecision = tf32" in text else "fp32"
    named = {"f16": "fp16", "bf16": "bf16", "i8": "int8", "f64": "fp64"}
    return named.get(kind, "fp8" if kind.startswith("f8") else "")


def _moved(text: str) -> int:
    """Bytes of the widest tensor that a load or a store names."""
    kinds = text.rsplit(" : ", 1)[-1].split(" loc(")[0]
    described = _DESCRIBED.search(kinds)
    if described:
        if "->" in kinds:  # a load may read less than the whole box
            kinds = kinds.split("->")[-1]
        else:
            return _product(described[1]) * _bits(described[2]) // 8
    sizes = [
        _product(shape) * _bits(_element(kind)) // 8 for shape, kind in _TENSOR.findall(kinds)
    ]  # fmt: skip
    if sizes:
        return max(sizes)
    return _bits(_element(kinds.strip())) // 8


def _element(kind: str) -> str:
    inner = re.search(r"ptr<([^<>,]+)", kind)
    return inner[1] if inner else kind


def _bits(kind: str) -> int:
    found = _BITS.match(kind.strip())
    if found is None:
        return 0
    if kind.strip().startswith(("f8", "fp8")):
        return 8
    bits = int(found[1])
    return 8 if bits == 1 else bits


def _product(shape: str) -> int:
    result = 1
    for size in shape.split("x"):
        result *= int(size) if size else 1
    return result


def _elements(kinds: str) -> int:
    found = _TENSOR.search(kinds)
    return _product(found[1]) if found else 1


def _lines(ttir: str) -> dict[str, int]:
    """Source lines by the name of a location."""
    found: dict[str, int] = {}
    aliases: dict[str, str] = {}
    for row in ttir.splitlines():
        if row.startswith("#loc"):
            plain, named = _LOC.match(row), _NAMED.match(row)
            if plain:
                found[plain[1]] = int(plain[3])
            elif named:
                aliases[named[1]] = named[2]
    for name, other in aliases.items():
        for _ in range(len(aliases)):
            if other in found:
                found[name] = found[other]
                break
            if other not in aliases:
                break
            other = aliases[other]
    return found


def _closings(rows: Sequence[str], lines: Mapping[str, int]) -> dict[int, int]:
    """Source line of what opens at a row, told where its brace closes."""
    found: dict[int, int] = {}
    stack: list[int] = []
    for at, row in enumerate(rows):
        text = row.strip()
        if text.startswith("#"):
            continue
        if text.startswith("}") and stack:
            opened = stack.pop()
            place = _AT.search(text)
            if place:
                found[opened] = lines.get(place[1], 0)
        if text.split(" loc(")[0].rstrip().endswith("{"):
            stack.append(at)
    return found

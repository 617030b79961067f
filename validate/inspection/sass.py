"""Machine code as nvdisasm prints it: instructions by kind, and the loops they stand in.

Loops are natural loops: a control-flow graph of basic blocks, its dominators, and every edge from
a block back to one that dominates it. Waits that spin on a barrier, often moved to the end of the
code, are told apart from loops that do work. What the graph cannot show (indirect branches) makes
the loops unknown, never guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

_LINE: Final = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*)"
)
_LABEL: Final = re.compile(r"^(\.L_\w+):")
_SECTION: Final = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_FILE: Final = re.compile(r'//## File "([^"]*)", line (\d+)')
_TARGET: Final = re.compile(r"`\((\.L_\w+)\)")
_INDIRECT: Final = ("BRX", "JMX", "BRXU", "JMXU")

CALL, WAIT = "CALL", "WAIT"
_CONTROL: Final = frozenset(
    (
        "BRA", "EXIT", "BAR", "BSSY", "BSYNC", "BREAK", "NOP", "WARPSYNC", "DEPBAR", "LDGDEPBAR",
        "LDTMDEPBAR", "RET", "KILL", "YIELD", "ELECT", "ERRBAR", "MEMBAR", "FENCE", "CCTL",
        "NANOSLEEP", "BMOV", "BPT", "UCGABAR_ARV", "UCGABAR_WAIT", "ACQBULK", "UTMACMDFLUSH",
        "UTMACCTL", "UTMAPF", "WARPGROUP", "WARPGROUPSET", "R2B", "B2R", "ARRIVES", "CS2R", "S2R",
        "S2UR", "USETMAXREG", "PREEXIT", "UTCBAR", "UTCATOMSWS", "UTCSHIFT", "PMTRIG",
        "ENDCOLLECTIVE", "COLLECTIVE", "VOTE", "VOTEU", "REDUX",
    )
)  # fmt: skip
_FMA: Final = frozenset(
    ("FFMA", "FADD", "FMUL", "FFMA32I", "FADD32I", "FMUL32I", "IMAD", "FSWZADD", "IDP", "IDP4A")
)
_HALF: Final = frozenset(
    (
        "HFMA2", "HADD2", "HMUL2", "HFMA", "HADD", "HMUL", "HFMA2_MMA", "HMNMX2", "HSET2",
        "HSETP2",
    )
)  # fmt: skip
_PAIRS: Final = frozenset(["FFMA2", "FADD2", "FMUL2"])
_DOUBLE: Final = frozenset(["DFMA", "DADD", "DMUL", "DSETP", "DMNMX"])
_CONVERT: Final = frozenset(["F2F", "F2I", "I2F", "FRND", "F2FR", "F2IP", "I2FR"])
_GLOBAL: Final = ("LDG", "STG", "LDGSTS", "LD", "ST", "LDS", "STS")
_MATRICES: Final = ("LDSM", "STSM", "LDSMT")
_SHARED: Final = frozenset(["ATOMS", "MOVM"])
_TMA: Final = frozenset(["UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED", "UTMASTG2D"])
_ATOMIC: Final = frozenset(["ATOM", "ATOMG", "RED", "REDG"])
_WIDTHS: Final = {"128": "128", "64": "64", "U8": "8", "S8": "8", "U16": "16", "S16": "16",
                  "256": "256"}  # fmt: skip
MATRIX: Final = ("HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "BMMA")
GROUP_MATRIX: Final = ("HGMMA", "IGMMA", "QGMMA", "BGMMA")
TENSOR_MEMORY_MATRIX: Final = ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA", "UTCMXQMMA")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its address, predicate, opcode with modifiers, operands, source line."""

    address: int
    predicate: str
    opcode: str
    operands: str
    line: tuple[str, int] | None = None

    @property
    def target(self) -> str | None:
        """The label that it jumps to, if it does."""
        found = _TARGET.search(self.operands)
        return found[1] if found else None

    @property
    def is_branch(self) -> bool:
        """Does it jump to a label?"""
        return self.opcode.split(".")[0] in ("BRA", "JMP") and self.target is not None

    @property
    def always(self) -> bool:
        """Is it taken whatever its predicates say?"""
        bare = not self.operands.split("`")[0].replace("PT,", "").strip(" ,")
        return not self.predicate and bare


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop of the machine code: instructions by kind in one pass, inner loops left out.

    `counts` takes every path through it as gone; `always` only what no pass goes around.
    `depth` is 0 for an outermost one; `outer` the index of the loop around it. `is_wait`: it only
    spins on a barrier. `lines` are the source lines its own instructions come from, most first.
    """

    depth: int
    outer: int | None
    counts: Mapping[str, int]
    always: Mapping[str, int]
    is_wait: bool = False
    lines: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A kernel's machine code: instructions by kind, loops by address; None: cannot be known."""

    counts: Mapping[str, int]
    loops: tuple[Loop, ...] | None
    why_unknown: str = ""


def kind_of(opcode: str) -> str:
    """The kind an instruction is counted as.

    >>> kind_of("LDGSTS.E.BYPASS.128"), kind_of("HGMMA.64x256x16.F32.BF16"), kind_of("FADD.FTZ")
    ('LDGSTS.128', 'HGMMA.64x256x16', 'FMA')
    >>> kind_of("LDSM.16.MT88.4"), kind_of("STS"), kind_of("LDTM.x128"), kind_of("MUFU.EX2")
    ('LDSM.4', 'STS.32', 'LDTM.x128', 'MUFU.EX2')
    """
    base, *modifiers = opcode.split(".")
    if base in MATRIX or base in GROUP_MATRIX:
        shape = next((m for m in modifiers if m[:1].isdigit()), "")
        return f"{base}.{shape}" if shape else base
    if base == "MUFU":
        return f"MUFU.{modifiers[0]}" if modifiers else base
    if base in _GLOBAL:
        return f"{base}.{next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), '32')}"
    if base in _MATRICES:
        return f"{base}.{next((m for m in modifiers if m in ('2', '4')), '1')}"
    if base in ("LDTM", "STTM"):
        return f"{base}.{next((m for m in modifiers if m[0] == 'x'), 'x1')}"
    if base in ("LDL", "STL", "SHFL", "SYNCS") or base.startswith("CALL"):
        return base
    return _plain_kind(base)


def _plain_kind(base: str) -> str:
    for names, kind in (
        (TENSOR_MEMORY_MATRIX, base), (_TMA, base), (_SHARED, base), (_ATOMIC, "ATOMIC"),
        (_FMA, "FMA"), (_PAIRS, "FMA2"), (_HALF, "HALF"), (_DOUBLE, "DOUBLE"),
        (_CONVERT, "CONVERT"), (_CONTROL, "CONTROL"),
    ):  # fmt: skip
        if base in names:
            return kind
    return "UNIFORM" if base.startswith("U") or base == "R2UR" else "ALU"


def instructions(text: str, kernel: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a kernel's own section, and the index that each label stands at."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    inside, line = False, None
    for row in text.splitlines():
        section = _SECTION.match(row)
        if section:
            inside = section[1] == kernel
        elif inside:
            label, place, code = _LABEL.match(row), _FILE.search(row), _LINE.match(row)
            if label:
                labels[label[1]] = len(found)
            elif place and "inlined" not in row:
                line = (place[1], int(place[2]))
            elif code:
                found.append(
                    Instruction(int(code[1], 16), code[2] or "", code[3], code[4].strip(), line)
                )
    return found, labels


def read(text: str, kernel: str) -> Code:
    """Counts and loops of a kernel from nvdisasm's text."""
    code, labels = instructions(text, kernel)
    code = [i for i in code if i.opcode != "NOP"] if not labels else code
    counts = counted(code)
    odd = next((i.opcode for i in code if i.opcode.split(".")[0] in _INDIRECT), None)
    if odd is not None:
        return Code(counts=counts, loops=None, why_unknown=f"an indirect branch ({odd})")
    blocks, edges = _graph(code, labels)
    return Code(counts=counts, loops=_loops(code, blocks, edges))


def counted(code: Iterable[Instruction]) -> dict[str, int]:
    """Instructions by kind, names in order."""
    found = Counter(kind_of(i.opcode) for i in code if i.opcode != "NOP")
    return dict(sorted(found.items()))


def _graph(
    code: Sequence[Instruction], labels: Mapping[str, int]
) -> tuple[list[range], list[list[int]]]:
    """Basic blocks as ranges of instructions, and the blocks that each may go on to."""
    cuts = {0, len(code), *labels.values()}
    for at, one in enumerate(code):
        if one.is_branch or one.opcode.split(".")[0] in ("EXIT", "RET"):
            cuts.add(at + 1)
    edges_at = sorted(c for c in cuts if c <= len(code))
    blocks = [range(a, b) for a, b in pairwise(edges_at)]
    starts = {block.start: number for number, block in enumerate(blocks)}
    edges: list[list[int]] = []
    for number, block in enumerate(blocks):
        last = code[block.stop - 1]
        to = labels.get(last.target or "", len(code))
        goes = [starts[to]] if last.is_branch and to < len(code) else []
        ends = last.opcode.split(".")[0] in ("EXIT", "RET", "BRA", "JMP") and last.always
        if not ends and number + 1 < len(blocks):
            goes.append(number + 1)
        edges.append(goes)
    return blocks, edges


def _dominators(edges: Sequence[Sequence[int]]) -> list[int]:
    """For each block the set of its dominators as bits; 0 where it is not reached."""
    reached, order = {0}, [0]
    for node in order:
        for onward in edges[node]:
            if onward not in reached:
                reached.add(onward)
                order.append(onward)
    before: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for onward in edges[node]:
            before[onward].append(node)
    every = sum(1 << node for node in order)
    found = [0] * len(edges)
    for node in order:
        found[node] = every if node else 1
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            met = every
            for earlier in before[node]:
                met &= found[earlier]
            met |= 1 << node
            changed |= met != found[node]
            found[node] = met
    return found


def _natural(edges: Sequence[Sequence[int]], above: Sequence[int]) -> dict[int, set[int]]:
    """Blocks of every natural loop, by its head."""
    before: dict[int, list[int]] = {}
    for node, goes in enumerate(edges):
        for onward in goes:
            if above[node]:
                before.setdefault(onward, []).append(node)
    found: dict[int, set[int]] = {}
    for node, goes in enumerate(edges):
        for head in goes:
            if above[node] >> head & 1:
                body = found.setdefault(head, {head})
                open_nodes = [node]
                while open_nodes:
                    here = open_nodes.pop()
                    if here not in body:
                        body.add(here)
                        open_nodes.extend(before.get(here, ()))
    return found


@dataclass(slots=True)
class _Nest:
    """A loop while its place among the others is looked for."""

    head: int
    body: set[int]
    own: set[int] = field(default_factory=set)


def _loops(
    code: Sequence[Instruction], blocks: Sequence[range], edges: Sequence[Sequence[int]]
) -> tuple[Loop, ...]:
    above = _dominators(edges)
    nests = [_Nest(head, body) for head, body in sorted(_natural(edges, above).items())]
    nests = [n for n in nests if not _stops(code, blocks, n)]
    outers: list[int | None] = []
    for number, nest in enumerate(nests):
        around = [
            j for j, other in enumerate(nests) if j != number and nest.body < other.body
        ]  # fmt: skip
        outers.append(min(around, key=lambda j: len(nests[j].body), default=None))
        inner = [o.body for o in nests if o.body < nest.body]
        nest.own = nest.body.difference(*inner)
    found = []
    for number, nest in enumerate(nests):
        own = [code[i] for b in sorted(nest.own) for i in blocks[b]]
        sure = _unavoidable(nest, edges, above)
        always = [code[i] for b in sorted(nest.own) if sure >> b & 1 for i in blocks[b]]
        depth, at = 0, outers[number]
        while at is not None:
            depth, at = depth + 1, outers[at]
        lines = Counter(i.line for i in own if i.line is not None)
        found.append(
            Loop(
                depth=depth, outer=outers[number], counts=counted(own),
                always=counted(always), is_wait=_spins(own),
                lines=tuple(line for line, _ in lines.most_common(8)),
            )
        )  # fmt: skip
    return tuple(found)


def _unavoidable(
    nest: _Nest, edges: Sequence[Sequence[int]], above: Sequence[int]
) -> int:  # fmt: skip
    """Blocks, as bits, that every pass of a loop goes through: they dominate its way back."""
    sure = -1
    for node in nest.body:
        if nest.head in edges[node]:
            sure &= above[node]
    return sure


def _stops(code: Sequence[Instruction], blocks: Sequence[range], nest: _Nest) -> bool:
    """The trap after the end: an unconditional branch to itself."""
    if len(nest.body) > 1:
        return False
    own = blocks[nest.head]
    return len(own) == 1 and code[own.start].always


def _spins(own: Sequence[Instruction]) -> bool:
    """Does a loop only wait: asks a barrier, and neither computes nor moves anything?"""
    kinds = {kind_of(i.opcode) for i in own}
    asks = any(i.opcode.startswith(("SYNCS", "UTCATOMSWS", "NANOSLEEP")) for i in own)
    return asks and kinds <= {"SYNCS", "CONTROL", "ALU", "UNIFORM", "FMA"} and len(own) < 24

"""Binaries made up for tests."""

from __future__ import annotations

from typing import Any

from validate.inspection.binary import Inspection
from validate.inspection.ledger import Entry
from validate.inspection.sass import Code, Loop
from validate.inspection.source import SourceLoop


def loop(depth: int = 0, outer: int | None = None, wait: bool = False, **counts: int) -> Loop:
    """A loop whose kinds are written with an underscore for the dot."""
    named = {kind.replace("_", "."): n for kind, n in counts.items()}
    return Loop(depth=depth, outer=outer, counts=named, always=named, is_wait=wait)


def source(depth: int = 0, outer: int | None = None, **figures: Any) -> SourceLoop:
    """A source loop."""
    return SourceLoop(depth=depth, outer=outer, **figures)


def binary(*loops: Loop, sources: tuple[SourceLoop, ...] = (), **figures: Any) -> Inspection:
    """A binary with those loops; its instructions are theirs and one store."""
    counts: dict[str, int] = {"STG.128": 1}
    for one in loops:
        for kind, number in one.counts.items():
            counts[kind] = counts.get(kind, 0) + number
    usual: dict[str, Any] = {
        "registers": 64, "stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0,
        "smem_bytes": 0, "num_warps": 4, "plain_warps": 4, "tensor_columns": 0,
        "code": Code(counts=counts, loops=loops),
        "source": (SourceLoop(depth=-1, outer=None, store_bytes=512), *sources),
    }  # fmt: skip
    return Inspection(**(usual | figures))


def entry(kernel: str, name: str, arch: int, found: Inspection, digest: str = "0" * 16) -> Entry:
    """An entry of the record."""
    return Entry(kernel=kernel, name=name, arch=arch, digest=digest, triton="3.7.1", found=found)

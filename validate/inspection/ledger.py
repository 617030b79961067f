"""The committed record of every shipped binary: `validate/data/kernels/inspection.json`.

One line an entry, sorted, so that a change reads as a change of lines. An entry holds the digest
of what it was made from and the version of Triton that made it; source lines are left out, since
comments move them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hwmodels.errors import InputError
from validate.inspection import sass
from validate.inspection.binary import Inspection
from validate.inspection.source import SourceLoop

VERSION: Final = 1
PATH: Final = Path(__file__).parents[1] / "data" / "kernels" / "inspection.json"
_FIGURES: Final = (
    "registers", "stack_bytes", "spill_store_bytes", "spill_load_bytes", "smem_bytes", "num_warps",
    "plain_warps", "tensor_columns",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One shipped binary: a kernel, its configuration's name, an architecture."""

    kernel: str
    name: str
    arch: int
    digest: str
    triton: str
    found: Inspection

    @property
    def key(self) -> str:
        """Unique among entries."""
        return key(self.kernel, self.name, self.arch)

    @property
    def launch(self) -> str:
        """The label of its tile configuration."""
        return self.name.rsplit(":", 1)[-1]


def key(kernel: str, name: str, arch: int) -> str:
    """What an entry is found by."""
    return f"{kernel}/{name}@sm_{arch}"


def plain_loop(loop: sass.Loop) -> dict[str, Any]:
    """A loop's figures; `maybe` are instructions that a pass may go around."""
    maybe = {
        kind: number - loop.always.get(kind, 0)
        for kind, number in loop.counts.items()
        if number != loop.always.get(kind, 0)
    }
    made: dict[str, Any] = {"depth": loop.depth, "outer": loop.outer, "counts": dict(loop.counts)}
    return made | ({"maybe": maybe} if maybe else {}) | ({"wait": True} if loop.is_wait else {})


def _loop(found: Mapping[str, Any]) -> sass.Loop:
    counts, maybe = found["counts"], found.get("maybe", {})
    always = {k: n - maybe.get(k, 0) for k, n in counts.items() if n != maybe.get(k, 0)}
    return sass.Loop(
        depth=found["depth"], outer=found["outer"], counts=counts, always=always,
        is_wait=found.get("wait", False),
    )  # fmt: skip


def plain(found: Inspection) -> dict[str, Any]:
    """A binary's figures in JSON's types."""
    loops = found.code.loops
    made: dict[str, Any] = {name: getattr(found, name) for name in _FIGURES}
    made["counts"] = dict(found.code.counts)
    made["loops"] = None if loops is None else [plain_loop(x) for x in loops]
    if found.code.why_unknown:
        made["why_unknown"] = found.code.why_unknown
    made["source"] = [x.plain() for x in found.source]
    return made


def inspection(found: Mapping[str, Any]) -> Inspection:
    """From what `plain` wrote."""
    loops = found["loops"]
    code = sass.Code(
        counts=found["counts"], why_unknown=found.get("why_unknown", ""),
        loops=None if loops is None else tuple(_loop(x) for x in loops),
    )  # fmt: skip
    return Inspection(
        **{name: found[name] for name in _FIGURES}, code=code,
        source=tuple(SourceLoop.of(x) for x in found["source"]),
    )  # fmt: skip


def read(path: Path = PATH) -> dict[str, Entry]:
    """Every entry by key; none where there is no file yet."""
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(
            f"{path}: is no JSON; remove it and run `python -m validate.inspect --all`"
        ) from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise InputError(f"{path}: has no known version; this reads {VERSION}")
    entries = [_entry(x) for x in document["entries"]]
    return {x.key: x for x in entries}


def _entry(found: Mapping[str, Any]) -> Entry:
    named = ("kernel", "name", "arch", "digest", "triton")
    return Entry(**{name: found[name] for name in named}, found=inspection(found))


@contextlib.contextmanager
def alone(path: Path = PATH) -> Iterator[None]:
    """No other process renews the record meanwhile: two would drop each other's entries."""
    import fcntl  # where there is none, nothing can be compiled either

    lock = path.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process renews {path}; wait for its end") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def write(entries: Iterable[Entry], path: Path = PATH) -> None:
    """All entries, whole or not at all: a killed run leaves the file of before."""
    lines = [
        json.dumps(
            {
                "kernel": x.kernel, "name": x.name, "arch": x.arch, "digest": x.digest,
                "triton": x.triton, **plain(x.found),
            },
            separators=(",", ":"),
        )
        for x in sorted(entries, key=lambda x: (x.kernel, x.arch, x.name))
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    text = f'{{"version":{VERSION},"entries":[\n' + ",\n".join(lines) + "\n]}\n"
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)

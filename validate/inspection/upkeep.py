"""Keeps the committed record of shipped binaries, and holds it against the sources."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hwmodels.errors import UnknownNameError
from validate.inspection import ledger
from validate.inspection.binary import Inspection, require_triton
from validate.inspection.exceptions import SPILLS
from validate.inspection.ledger import Entry
from validate.inspection.pool import Job, jobs, run
from validate.kernels import registry

SAVED_EVERY: Final = 25
"""Binaries between two writes of the record while it is renewed."""
OTHER_VERSION_REGISTERS: Final = 32
"""Registers by which a binary of another Triton may differ: of flash attention on sm_90, 3.9.0
takes 184 and 3.7.1 takes 174."""
OTHER_VERSION_FRAC: Final = 0.25
"""Share by which its instructions of one kind may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What is wrong with the record; all empty where nothing is."""

    missing: tuple[str, ...]
    stale: tuple[str, ...]
    extra: tuple[str, ...]
    spilling: tuple[str, ...]
    idle: tuple[str, ...]

    @property
    def fine(self) -> bool:
        """Is nothing wrong?"""
        return not (self.missing or self.stale or self.extra or self.spilling or self.idle)


def held(wanted: Iterable[Job], entries: Mapping[str, Entry]) -> Findings:
    """The record against what is shipped.

    `missing` has no entry, `stale` has one of other sources, `extra` is shipped no more, `spilling`
    spills beyond its named exception, `idle` is an exception that nothing shipped needs.
    """
    by_key = {job.key: job for job in wanted}
    stale = (k for k, job in by_key.items() if k in entries and entries[k].digest != job.digest)
    spilling = (k for k, entry in entries.items() if k in by_key and _spills(entry))
    idle = (
        k for k in SPILLS
        if k in by_key and k in entries and not entries[k].found.spill_bytes
    )  # fmt: skip
    kernels = {job.kernel for job in by_key.values()}
    return Findings(
        missing=tuple(sorted(set(by_key) - set(entries))), stale=tuple(sorted(stale)),
        extra=tuple(
            sorted(k for k, e in entries.items() if k not in by_key and e.kernel in kernels)
        ),
        spilling=tuple(sorted(spilling)), idle=tuple(sorted(idle)),
    )  # fmt: skip


def _spills(entry: Entry) -> bool:
    allowed = SPILLS[entry.key].most_bytes if entry.key in SPILLS else 0
    return entry.found.spill_bytes > allowed


def _named(kernels: Sequence[str]) -> None:
    known = [spec.name for spec in registry.specs()]
    for name in kernels:
        if name not in known:
            raise UnknownNameError("kernel", name, known)


def renew(kernels: Sequence[str] = (), *, processes: int = 2, path: Path = ledger.PATH) -> int:
    """Compile what is missing or stale, drop what is shipped no more; print a summary."""
    with ledger.alone(path):
        return _renewed(kernels, processes, path)


def _renewed(kernels: Sequence[str], processes: int, path: Path) -> int:
    version = require_triton()
    _named(kernels)
    wanted = jobs(kernels)
    entries = ledger.read(path)
    old = [
        job for job in wanted
        if job.key not in entries or entries[job.key].digest != job.digest
        or entries[job.key].triton != version
    ]  # fmt: skip
    failed: dict[str, str] = {}
    start, finished = time.monotonic(), 0

    def done(job: Job, answer: Mapping[str, Any]) -> None:
        nonlocal finished
        finished += 1
        if "error" in answer:
            failed[job.key] = answer["error"]
            entries.pop(job.key, None)
        else:
            entries[job.key] = Entry(
                kernel=job.kernel, name=job.name, arch=job.arch, digest=answer["digest"],
                triton=answer["triton"], found=ledger.inspection(answer["found"]),
            )  # fmt: skip
        if finished % SAVED_EVERY == 0:
            ledger.write(entries.values(), path)
            print(f"{finished} of {len(old)} compiled", file=sys.stderr, flush=True)

    run(old, done, processes=processes)
    known = {job.key for job in wanted}
    kept = [e for e in entries.values() if e.key in known or (kernels and e.kernel not in kernels)]
    ledger.write(kept, path)
    seconds = time.monotonic() - start
    print(f"compiled {len(old)} of {len(wanted)} binaries in {seconds:.0f} s, triton {version}")
    return _summary(wanted, ledger.read(path), failed)


def _summary(wanted: Sequence[Job], entries: Mapping[str, Entry], failed: Mapping[str, str]) -> int:
    here = [entries[job.key] for job in wanted if job.key in entries]
    print(f"{'kernel':34}{'arch':>8}{'binaries':>9}{'registers':>12}{'smem KiB':>9}{'spilling':>9}")
    for kernel, arch in sorted({(e.kernel, e.arch) for e in here}):
        some = [e for e in here if (e.kernel, e.arch) == (kernel, arch)]
        registers = [e.found.registers for e in some]
        smem = max(e.found.smem_bytes for e in some) / 1024
        spilling = sum(e.found.spill_bytes > 0 for e in some)
        print(
            f"{kernel:34}{f'sm_{arch}':>8}{len(some):9}"
            f"{f'{min(registers)}-{max(registers)}':>12}{smem:9.1f}{spilling:9}"
        )
    for entry in here:
        if entry.found.spill_bytes:
            why = SPILLS[entry.key].reason if entry.key in SPILLS else "NO EXCEPTION NAMES IT"
            print(f"spills {entry.found.spill_bytes} bytes: {entry.key}: {why}")
    for name, error in failed.items():
        print(f"failed: {name}: {error}")
    findings = held(wanted, entries)
    _print(findings)
    return 0 if findings.fine and not failed else 1


def _print(findings: Findings) -> None:
    for name in ("missing", "stale", "extra", "spilling", "idle"):
        keys = getattr(findings, name)
        if keys:
            print(f"{name}: {len(keys)}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}")


def check(kernels: Sequence[str] = (), *, sample: int = 0, path: Path = ledger.PATH) -> int:
    """Print what is wrong with the record; 0 where nothing is."""
    require_triton()
    _named(kernels)
    wanted = jobs(kernels)
    entries = ledger.read(path)
    findings = held(wanted, entries)
    _print(findings)
    differing = _recompiled(chosen(wanted, sample), entries) if sample else []
    for line in differing:
        print(line)
    if not findings.fine:
        print("run `python -m validate.inspect --all` and commit the record")
    else:
        print(f"{len(wanted)} binaries of {len({j.kernel for j in wanted})} kernels: as recorded")
    return 0 if findings.fine and not differing else 1


def chosen(wanted: Sequence[Job], number: int) -> list[Job]:
    """A sample that stays the same while the sources do, and moves when they change."""
    return sorted(
        wanted, key=lambda job: hashlib.sha256(f"{job.key}{job.digest}".encode()).hexdigest()
    )[:number]  # fmt: skip


def _recompiled(sample: Sequence[Job], entries: Mapping[str, Entry]) -> list[str]:
    found: list[str] = []
    version = require_triton()

    def done(job: Job, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            found.append(f"{job.key}: {answer['error']}")
        elif job.key in entries:
            entry = entries[job.key]
            made = ledger.inspection(answer["found"])
            odd = differences(entry.found, made, same_version=entry.triton == version)
            found.extend(f"{job.key}: {x}" for x in odd)

    run(sample, done)
    return sorted(found)


def differences(held: Inspection, made: Inspection, *, same_version: bool) -> list[str]:
    """Where a fresh binary is not the recorded one; of another Triton, where it is far from it."""
    if same_version:
        a, b = ledger.plain(held), ledger.plain(made)
        return [
            f"{name}: recorded {a[name]}, now {b[name]}" for name in a if a[name] != b.get(name)
        ]
    found = []
    if abs(held.registers - made.registers) > OTHER_VERSION_REGISTERS:
        found.append(f"registers: recorded {held.registers}, now {made.registers}")
    kinds = Counter(held.code.counts)
    for kind, number in kinds.items():
        now = made.code.counts.get(kind, 0)
        if "MMA" in kind and abs(now - number) > OTHER_VERSION_FRAC * number:
            found.append(f"{kind}: recorded {number}, now {now}")
    return found

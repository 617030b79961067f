"""Compiles shipped binaries in worker processes; one that dies costs its own job alone."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from hwmodels.errors import InputError
from validate.inspection import ledger
from validate.inspection.binary import Inspection, compiled, require_triton
from validate.inspection.digest import digest
from validate.kernels.spec import ARCHITECTURES, Compilation

ROOT: Final = Path(__file__).parents[2]
INTERPRET: Final = "TRITON_INTERPRET"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One binary that is shipped: where it is found, and the digest of what makes it."""

    kernel: str
    name: str
    arch: int
    digest: str

    @property
    def key(self) -> str:
        """As the entry's."""
        return ledger.key(self.kernel, self.name, self.arch)


def shipped() -> dict[tuple[str, str], Compilation]:
    """Every compilation of every registered kernel by the kernel's and its own name."""
    from validate.kernels import registry

    found: dict[tuple[str, str], Compilation] = {}
    for spec in registry.specs():
        for one in spec.compilations():
            if found.setdefault((spec.name, one.name), one) is not one:
                raise InputError(f"{spec.name} ships two binaries named {one.name}")
    return found


def jobs(kernels: Sequence[str] = (), archs: Sequence[int] = ARCHITECTURES) -> list[Job]:
    """Every binary that is shipped of some kernels (all where none is named)."""
    return [
        Job(kernel=kernel, name=name, arch=arch, digest=made_from)
        for (kernel, name), one in shipped().items()
        if not kernels or kernel in kernels
        for made_from in (digest(one),)
        for arch in archs
        if one.launch.suits(arch)
    ]


def compile_shipped(one: Compilation, arch: int) -> Inspection:
    """One shipped binary, compiled here."""
    return compiled(
        one.function, signature=one.signature, constants=one.constants, aligned=one.aligned,
        num_warps=one.launch.num_warps, num_stages=one.launch.num_stages, arch=arch,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """The environment of a process that compiles: not interpreting, this project in its path."""
    kept = {name: value for name, value in os.environ.items() if name != INTERPRET}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH", "")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def serve(given: IO[str], told: IO[str]) -> None:
    """A worker: a job a line in, its figures or its complaint a line out."""
    version = require_triton()
    found = shipped()
    for line in given:
        job = json.loads(line)
        try:
            one = found[job["kernel"], job["name"]]
            made = compile_shipped(one, job["arch"])
            answer: dict[str, Any] = {
                "triton": version, "digest": digest(one), "found": ledger.plain(made),
            }  # fmt: skip
        except InputError as error:
            answer = {"error": str(error)}
        told.write(json.dumps(answer) + "\n")
        told.flush()


class Worker:
    """A process that serves; started when it is first needed, and anew after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, job: Job) -> Mapping[str, Any]:
        """The worker's answer to a job."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "validate.inspect", "--worker"], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=environment(),
            )  # fmt: skip
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        asked = {"kernel": job.kernel, "name": job.name, "arch": job.arch}
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            self._process = None
            return {"error": f"the compiler ended with code {code}"}
        found: Mapping[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


def run(
    wanted: Sequence[Job],
    done: Callable[[Job, Mapping[str, Any]], None],
    *,
    processes: int = 2,
) -> None:
    """Compile all; `done` is called with each answer, one at a time."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in wanted:
        waiting.put(job)
    lock = threading.Lock()

    def work() -> None:
        worker = Worker()
        try:
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                answer = worker.run(job)
                with lock:
                    done(job, answer)
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(min(processes, len(wanted)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

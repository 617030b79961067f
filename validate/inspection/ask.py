"""Asks a process of its own for a binary: one that does not interpret, whatever this one does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwmodels.errors import InputError
from validate.inspection import ledger
from validate.inspection.binary import Inspection
from validate.inspection.ledger import Entry
from validate.inspection.pool import environment


def own(
    path: Path,
    function: str,
    *,
    arch: int,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
) -> Inspection:
    """A kernel of a user's own file, compiled for a compute capability."""
    asked = {
        "path": str(path.absolute()), "function": function, "arch": arch,
        "signature": dict(signature), "constants": dict(constants), "num_warps": num_warps,
        "num_stages": num_stages,
    }  # fmt: skip
    return ledger.inspection(_answer("--own", asked)["found"])


def shipped(kernel: str, *, arch: int, config: str = "") -> tuple[Entry, ...]:
    """Binaries of a shipped kernel, compiled afresh."""
    asked = {"kernel": kernel, "arch": arch, "config": config}
    return tuple(
        Entry(
            kernel=x["kernel"], name=x["name"], arch=x["arch"], digest=x["digest"],
            triton=x["triton"], found=ledger.inspection(x["found"]),
        )
        for x in _answer("--shipped", asked)["entries"]
    )  # fmt: skip


def _answer(option: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "validate.inspect", option, json.dumps(asked)],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        told = next((x for x in lines if x.startswith("error: ")), "")
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise InputError(told.removeprefix("error: ") or f"the compiler failed: {last}")
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

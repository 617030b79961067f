"""Running the program as a user does: a process of its own, or in this one where that will do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def ridgeplan(
    *args: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`ridgeplan ARGS` in a process of its own."""
    return python("from cli.main import run; run()", *args, env=env, cwd=cwd)


def python(
    code: str, *args: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Python with this project on its path."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **(env or {})}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True, text=True, env=whole, cwd=cwd or ROOT, timeout=120,
    )  # fmt: skip

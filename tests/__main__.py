"""Everything a change must pass: `python -m tests` (what CI runs; extra arguments go to pytest)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent


def steps(pytest_args: list[str]) -> list[list[str]]:
    """The commands in order: lint, format, types, tests with coverage of the three lower floors."""
    workers = str(min(4, os.cpu_count() or 1))
    return [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["pytest", "-n", workers, "--cov", "--cov-fail-under=90", *pytest_args],
    ]


def main() -> int:
    """Run every step; stop at the first that fails."""
    for step in steps(sys.argv[1:]):
        print("+", *step, flush=True)
        code = subprocess.call([str(TOOLS / step[0]), *step[1:]], cwd=ROOT)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

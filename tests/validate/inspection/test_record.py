"""The committed record is whole, current, free of spills, and what the compiler makes today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from validate.inspection.pool import environment

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = 8


def test_the_committed_record_holds() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "validate.inspect", "--check", "--sample", str(SAMPLE)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("as recorded")

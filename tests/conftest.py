"""Fixtures shared by every floor's tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published measurements: RIDGEPLAN_DATA, or shared/data beside the project."""
    given = os.environ.get("RIDGEPLAN_DATA")
    folder = Path(given) if given else PROJECT.parent / "shared" / "data"
    if not (folder / "calib").is_dir():
        reason = f"no published measurements at {folder}; set RIDGEPLAN_DATA to their folder"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder

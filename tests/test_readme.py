"""What the README shows runs, and what it calls the test command is what CI runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
SETUP = [line for line in CONSOLE if line.startswith("python3 -m venv")]
MAIN_JOB = SETUP[0].partition(".venv/bin/ridgeplan ")[2]
COMMANDS = [MAIN_JOB, *(c.removeprefix("ridgeplan ") for c in CONSOLE if c.startswith("ridgeplan"))]


def test_the_two_commands_stand_in_the_first_screen() -> None:
    assert len(SETUP) == 2
    first_screen = README.split("\n## ")[0].splitlines()
    assert len(first_screen) < 30
    assert all(f"$ {command}" in first_screen for command in SETUP)


def test_ci_runs_the_readme_test_command_word_for_word() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert SETUP[1] in script


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, tmp_path: Path) -> None:
    """In a folder of their own: what they write stays there."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = Path(sys.executable).parent / "ridgeplan"
    done = subprocess.run(
        [str(program), *shlex.split(command)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_library_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "tensor"


def test_the_tree_names_what_exists() -> None:
    (tree,) = re.findall(r"## Where things are\n\n```\n(.*?)```", README, re.S)
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).is_dir(), line


def test_links_point_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target

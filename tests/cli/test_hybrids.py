"""Stacks of attention, scans and convolutions at the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cli.main import main


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_hybrid_is_planned_with_modes_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(
        capsys, "plan", "examples/bamba-9b.json", "--cluster", "dgx-h100", "--nodes", "8",
        "--seq", "8192", "--global-batch", "256", "--memory-budget", "24GB", "--pin", "pp=4",
        "--top", "1",
    )  # fmt: skip
    assert (found["status"], found["gap_frac"]) == ("optimal", 0.0)
    sizes = [stage["layers"] for stage in found["stages"]]
    assert sum(sizes) == 32 and len(set(sizes)) > 1
    modes = [stage["modes_by_kind"] for stage in found["stages"]]
    assert {kind for own in modes for kind in own} == {"dense", "dense mamba2"}
    assert any({"none", "full"} <= set(own["dense mamba2"]) for own in modes)
    assert found["measured_over_bound"] is None  # no published step of such a model was compared


def test_serving_tells_what_was_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "serve", "examples/lfm2-1.2b.json", "--device", "h100-sxm", "-c", "64")
    assert any("No published figure of a model with conv layers" in n for n in found["notes"])
    assert found["memory"]["state_bytes"] == 10 * 2048 * 2 * 2


def test_simulation_gives_no_range(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("simulate", "examples/lfm2-1.2b.json", "--cluster", "dgx-h100", "--seq", "4096",
             "--global-batch", "64")  # fmt: skip
    assert main(list(words)) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "none with conv layers was compared" in told and "(80 %" not in told


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "examples/jamba-v0.1.json", "-c", "dgx-h100", "--seq", "8k", "--pin", "cp=2"),
        ("plan", "sequences", "examples/bamba-9b.json", "-c", "hgx-h100", "--seq", "32k"),
        ("plan", "memory", "examples/bamba-9b.json", "-c", "hgx-h100", "--seq", "32k",
         "--host-memory", "2TB", "--pin", "cp=8"),
    ],
)  # fmt: skip
def test_sequences_are_not_split(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert main(list(words)) == 2
    told = capsys.readouterr().err
    assert "hand a state from token to token" in told and told.count("\n") == 1

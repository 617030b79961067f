"""`--sequence-parallel` of plan and simulate, and `plan sequences`: answers and refusals."""

from __future__ import annotations

import json

import pytest

from cli.main import main

MODEL = "examples/llama3-8b.json"
ASKED = [MODEL, "-c", "hgx-h100", "-n", "2", "--seq", "128k", "-b", "8"]


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert main([*argv, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_named_split_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {}
    for name in ("ring-contiguous", "ring-zigzag", "ulysses", "lightseq"):
        found = told(capsys, "simulate", *ASKED, "--pin", "cp=8", "--pin", "recompute=full",
                     "--sequence-parallel", name)  # fmt: skip
        seconds[name] = float(found["seconds"])  # type: ignore[arg-type]
        assert found["plan"]["cp"] == 8  # type: ignore[index]
    assert seconds["ring-contiguous"] > 1.3 * seconds["ring-zigzag"]
    assert seconds["lightseq"] < seconds["ring-zigzag"]


def test_a_hybrid_takes_its_degree(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "plan", *ASKED, "--sequence-parallel", "hybrid", "--pin", "cp=16",
                 "--pin", "ulysses=8")  # fmt: skip
    best = found["plans"][0]["plan"]  # type: ignore[index]
    assert (best["sequence"], best["ulysses"], best["cp"]) == (7, 8, 16)


def test_all_ways_hold_the_usual_one(capsys: pytest.CaptureFixture[str]) -> None:
    usual, every = (
        told(capsys, "plan", *ASKED, *more) for more in ([], ["--sequence-parallel", "all"])
    )
    assert every["num_evaluated"] > 3 * usual["num_evaluated"]  # type: ignore[operator]
    fastest = [found["plans"][0]["seconds"] for found in (every, usual)]  # type: ignore[index]
    assert fastest[0] <= fastest[1]


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (["--sequence-parallel", "ulysses", "--pin", "cp=16"], "must divide the 8 key and value"),
        (["--sequence-parallel", "ring-zigzag", "--pin", "cp=1"], "nobody to share"),
        (["--sequence-parallel", "lasp2"], "softmax attention"),
        (["--sequence-parallel", "nix"], "known: ring-zigzag"),
        (["--pin", "ulysses=2"], "belongs to the hybrid"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_refusals_are_one_line(
    command: str, given: list[str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *ASKED, *given]) == 2
    text = capsys.readouterr().err.strip()
    assert rule in text and "\n" not in text


def test_groups_for_sequences_of_all_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    """Mixed groups are no slower than one size, balanced hybrids than static rings."""
    found = told(capsys, "plan", "sequences", MODEL, "-c", "hgx-h100", "-n", "2", "--seq", "64k",
                 "-b", "128")  # fmt: skip
    steps = {row["system"]: row["seconds"] for row in found["steps"]}  # type: ignore[attr-defined]
    one, best, mixed, rings, _, balanced = steps.values()
    assert mixed <= best <= one and balanced <= rings
    assert (
        main(["plan", "sequences", MODEL, "-c", "hgx-h100", "--seq", "64k", "--corpus", "x"]) == 2
    )
    assert "known: byted" in capsys.readouterr().err

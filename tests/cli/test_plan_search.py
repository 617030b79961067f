"""`ridgeplan plan` for training: proof, stages, prices and their options."""

from __future__ import annotations

import json

import pytest

from cli.main import main

JOB = ("plan", "examples/llama3-70b.json", "-c", "hgx-h100", "-n", "4", "--seq", "4k", "-b", "64")


def answer(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, object]:
    assert main([*JOB, *more, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_the_proof_and_the_stages_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--memory-budget", "52GB", "--host-memory", "1TB")
    assert (found["status"], found["gap_frac"]) == ("optimal", 0.0)
    assert 0 < found["solve_s"] < 10  # type: ignore[operator]
    assert found["budget_bytes"] == 52e9
    stages = found["stages"]
    assert isinstance(stages, list)
    assert sum(s["layers"] for s in stages) == 80
    assert all(sum(s["modes"].values()) == s["layers"] for s in stages)
    assert max(s["memory_bytes"] for s in stages) <= 52e9
    best = found["plans"][0]  # type: ignore[index]
    assert max(s["memory_bytes"] for s in stages) == best["memory_bytes"]
    assert {p["resource"] for p in found["prices"]} >= {"device memory", "nvlink"}  # type: ignore[attr-defined]
    now = [p for p in found["memory_curve"] if p["budget_bytes"] == 52e9]  # type: ignore[attr-defined]
    assert now[0]["seconds"] == pytest.approx(best["seconds"], rel=1e-9)


def test_a_node_of_the_catalogue_says_its_own_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(host: str) -> object:
        found = answer(capsys, "-c", "dgx-h100", "--memory-budget", "52GB", "--host-memory", host)
        return found["plans"][0]["seconds"]  # type: ignore[index]

    assert seconds("node") == seconds("2TB")
    assert main([*JOB, "--host-memory", "node"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "no figure for the memory of a host of hgx-h100" in err


def test_an_explanation_has_the_program_with_its_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*JOB, "--explain"]) == 0
    text = capsys.readouterr().out
    for words in ("price of", "same mesh", "memory 0", "time 0", "none is faster"):
        assert words in text, words


def test_limits_end_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--time-limit", "1ns")
    assert found["status"] == "feasible"
    assert 0 < found["gap_frac"] < 1  # type: ignore[operator]
    assert answer(capsys, "--gap", "50%")["gap_frac"] <= 0.5  # type: ignore[operator]


def test_the_order_of_the_axes_is_searched_or_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    """Auto is never slower than an order that is searched, and the names are told."""
    seconds, pins = {}, ("--pin", "pp=2", "--pin", "dp=4", "--top", "2", "--memory-budget", "85GB")
    for order in ("auto", "tp-cp-dp-pp", "TP-CP-PP-DP"):
        found = answer(capsys, *pins, "--order", order)
        assert (found["status"], found["gap_frac"]) == ("optimal", 0.0)
        plans = found["plans"]
        assert isinstance(plans, list)
        assert order == "auto" or {p["order"] for p in plans} == {order.casefold()}
        seconds[order] = plans[0]["seconds"]
    assert answer(capsys, *pins, "--pin", "order=tp-cp-pp-dp")["plans"] == plans
    assert seconds["auto"] == min(seconds.values())
    assert seconds["TP-CP-PP-DP"] != seconds["tp-cp-dp-pp"]


@pytest.mark.parametrize(
    ("more", "words", "code"),
    [
        (("--memory-budget", "0GB"), "--memory-budget", 2),
        (("--memory-budget", "81TB"), "not within", 2),
        (("--time-limit", "0s"), "--time-limit", 2),
        (("--memory-budget", "1GB"), "GB more per accelerator", 3),
        (("--phase", "decode", "--explain"), "is for training", 2),
        (("-c", "dgx-1-v100", "--host-memory", "-1GB"), "--host-memory", 2),
        (("--order", "tp-cp-pp"), "unknown order of the axes 'tp-cp-pp'; did you mean", 2),
        (("--order", "inside-out"), "give tp, cp, dp and pp once each", 2),
        (("--order", "tp-cp-pp-dp", "--pin", "order=tp-cp-dp-pp"), "two orders; keep one", 2),
        (("--pin", "order=24"), "order=24 is no order of the axes", 2),
    ],
)
def test_one_line_says_what_is_wrong(
    more: tuple[str, ...], words: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*JOB, *more]) == code
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error

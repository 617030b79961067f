"""Claims of Prepacking: given lengths, the profile's conventions, and what is given up."""

from __future__ import annotations

from typing import Any

import pytest

from validate.claims.claim import Claim, NotModelledError
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.prepacking import (
    FULL,
    MIB,
    MMLU,
    ORDERED,
    PACKED,
    Run,
    corpus_lengths,
    evaluate_prepacking,
    run_of,
)
from workloads.models.parameters import count_parameters

LENGTHS = [900, 400, 300, 120, 60, 60, 30, 30] * 4
SET = {"gpu": "A6000-48GB", "model": "TinyLlama 1.1B ('llama1b')", "batch": 8, "lengths": LENGTHS}


def claim(quantity: str, kind: str = "latency", unit: str = "s", **setting: Any) -> Claim:
    return Claim(
        id="prepacking", family="packing", quantity=quantity, unit=unit, kind=kind, published=None,
        setting={**SET, **setting},
    )  # fmt: skip


def test_both_methods_and_one_of_them() -> None:
    both = evaluate_prepacking(claim("prefill time per batch"))
    assert isinstance(both, tuple) and both[0] < both[1]
    assert evaluate_prepacking(claim("prefill time", method="full-batching")) == both[1]
    assert evaluate_prepacking(claim("prepacking prefill time", unit="ms")) == 1e3 * both[0]
    gain = evaluate_prepacking(claim("speedup over full batching", "speedup", "x"))
    assert gain == pytest.approx(both[1] / both[0])
    ordered = evaluate_prepacking(claim("length-ordered prefill time"))
    assert both[0] < ordered < both[1]


def test_the_profile_is_the_authors() -> None:
    run = run_of(claim("prefill time"))
    assert run.model.name == "sheared-llama-1.3b"
    stored = run.weight_bytes * float(count_parameters(run.model).total)
    ends = 2 * 32000 * 2048
    layers = count_parameters(run.model).total - ends
    assert stored == pytest.approx(layers * (0.5 + 4 / 64) + 2 * ends)
    half = Run(run.model, run.on, run.held, run.batch, 16)
    assert half.weight_bytes == pytest.approx(2.0) and half.seconds(FULL) < run.seconds(FULL)


def test_peaks_hold_the_pass_before_by_hand() -> None:
    """Two passes of one prompt of 100: K, V and FP32 logits of the first are still there."""
    run = Run(run_of(claim("memory")).model, run_of(claim("memory")).on, (100, 100), 1, 16)
    one = run.passes(ORDERED)[0].memory()
    kept = 100 * (24 * 2 * 2048 * 2 + 4 * 32000)
    assert run.peak_bytes(ORDERED) == pytest.approx(one.total + kept)
    told = evaluate_prepacking(claim("peak memory", "memory", "MB"))
    assert isinstance(told, tuple)
    assert told[0] == pytest.approx(run_of(claim("memory")).peak_bytes(PACKED) / MIB)


def test_the_anchor_meets_the_row_it_stands_on() -> None:
    """The README's length-ordered row: 0.658 s and 22,950 MB; no claim is judged on it."""
    run = run_of(claim("time", batch=64))
    anchored = Run(run.model, run.on, corpus_lengths(*MMLU), 64, 4)
    assert anchored.seconds(ORDERED) == pytest.approx(0.658, rel=0.03)
    assert anchored.peak_bytes(ORDERED) / MIB == pytest.approx(22950, rel=0.03)


@pytest.mark.parametrize(
    ("quantity", "setting", "reason"),
    [
        ("speedup range", {"model": "GPT-99"}, "no sizes"),
        ("prefill time", {"lengths": None, "dataset": "nobody's"}, "not known"),
        ("prefill time", {"loadbit": 8}, "loadbit 8"),
        ("prefill time", {"lengths": [4, 0]}, "no sizes"),
        ("max batch at TTFT memory limit", {}, "largest batch"),
        ("TTFT", {}, "generation"),
        ("colour", {}, "no rule"),
    ],
)
def test_given_up(quantity: str, setting: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotModelledError, match=reason):
        evaluate_prepacking(claim(quantity, kind="other", **setting))


def test_through_the_registry() -> None:
    found = evaluate(claim("max batch", kind="memory", unit="x"))
    assert found.status == NOT_MODELLED

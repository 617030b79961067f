"""Verdicts: tolerances by kind, pairs and words, reasons, and that no published figure leaks."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from hwmodels.errors import InputError
from validate.claims import evaluate as module
from validate.claims.claim import NAMED, Claim, Value, not_modelled, read_claims
from validate.claims.evaluate import (
    NOT_MODELLED,
    OFF,
    REPRODUCED,
    evaluate,
    evaluate_all,
    evaluator,
    judged,
    ratio_of,
)
from validate.claims.score import balanced, record, score, scores
from workloads import registry

ROOT = Path(__file__).parents[3]
CLAIMS = Path(os.environ.get("RIDGEPLAN_DATA", ROOT.parent / "shared")) / "research" / "claims.json"


def claim(published: Value, kind: str = "latency", **more: object) -> Claim:
    fields: dict[str, object] = {
        "id": "x", "family": "f", "quantity": "q", "unit": "ms", "kind": kind,
        "published": published,
    } | more  # fmt: skip
    return Claim(**fields)


@pytest.mark.parametrize(
    ("kind", "predicted", "status"),
    [
        ("latency", 11.4, REPRODUCED), ("latency", 8.4, OFF), ("speedup", 8.6, REPRODUCED),
        ("memory", 10.19, REPRODUCED), ("memory", 10.3, OFF), ("complexity", 9.7, OFF),
        ("ratio", 9.9, REPRODUCED), ("tflops", 11.6, OFF),
    ],
)  # fmt: skip
def test_the_kind_sets_the_tolerance(kind: str, predicted: float, status: str) -> None:
    verdict = judged(claim(10.0, kind), predicted)
    assert (verdict.status, verdict.ratio) == (status, pytest.approx(predicted / 10))


def test_an_interval_is_met_inside_and_named_values_one_by_one() -> None:
    assert ratio_of((2.0, 4.0), 3.9, named=False) == 1.0
    assert ratio_of((2.0, 4.0), 5.0, named=False) == 1.25
    assert ratio_of((2.0, 4.0), (2.2, 4.0), named=True) == pytest.approx(1.1)
    assert ratio_of((2.0, 4.0), 3.0, named=True) is None
    assert judged(claim((2.0, 4.0), range_is=NAMED), (2.0, 5.0)).status == OFF


def test_words_are_reproduced_when_they_are_the_same() -> None:
    assert judged(claim("OOM", "memory"), "OOM").status == REPRODUCED
    assert judged(claim("OOM", "memory"), 3.0).status == OFF
    assert judged(claim(2.5), "OOM").status == OFF


def test_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate(claim(1.0)).reason == "no evaluator for x yet"

    def missing(c: Claim) -> Value:
        not_modelled("setting incomplete: no gpu")

    def impossible(c: Claim) -> Value:
        raise InputError("kv heads do not divide")

    def nothing(c: Claim) -> Value:
        return None

    for run, says in (
        (missing, "setting incomplete: no gpu"),
        (impossible, "setting impossible: kv heads do not divide"),
        (nothing, "the claim names nothing that can be computed"),
    ):
        monkeypatch.setattr(module, "evaluator", lambda _, run=run: run)
        verdict = evaluate(claim(1.0))
        assert (verdict.status, verdict.reason) == (NOT_MODELLED, says)


def test_scores_count_what_a_bar_counts() -> None:
    verdicts = [
        judged(claim(1.0), 1.3),
        judged(claim(1.0), 2.0),
        judged(claim(1.0, "memory"), 1.01),
        judged(claim(1.0, confidence="low"), 9.0),
        dataclasses.replace(
            judged(claim(1.0), 1.0), status=NOT_MODELLED, reason="setting incomplete: no gpu"
        ),
        dataclasses.replace(judged(claim(1.0), 1.0), status=NOT_MODELLED, reason="quality"),
    ]
    found = score("x", "f", verdicts)
    assert (found.num_claims, found.num_complete, found.num_evaluated) == (6, 4, 3)
    assert (found.reproduced, found.off, found.not_modelled) == (1, 3, 2)
    assert found.exact_within_frac == 1.0
    assert found.timed_median_error == pytest.approx(0.65)
    assert found.timed_within_factor_frac == 0.5
    alike = balanced([found, dataclasses.replace(found, timed_median_error=0.05)])
    assert (alike.num_systems, alike.timed_median_error) == (2, pytest.approx(0.35))
    assert record(verdicts)["x"] == {
        "claims": 6, "scored": 4, "evaluated": 3, "reproduced": 1, "off": 3
    }  # fmt: skip


def test_every_evaluator_belongs_to_a_published_system() -> None:
    known = {s.id for s in registry.systems()}
    assert set(module._MODULES) <= known
    assert all(callable(evaluator(name)) for name in module._MODULES)


@pytest.fixture(scope="module")
def published() -> list[Claim]:
    if not CLAIMS.is_file():
        if os.environ.get("CI"):
            pytest.fail(f"{CLAIMS} must be there")
        pytest.skip(f"no published claims at {CLAIMS}")
    return [c for c in read_claims(CLAIMS) if c.id in module._MODULES]


def test_no_evaluator_reads_the_published_figure(published: list[Claim]) -> None:
    """The same predictions come out with every figure replaced."""
    blind = [
        dataclasses.replace(c, published=(1.0, 2.0) if isinstance(c.published, tuple) else 7.0)
        for c in published
        if not isinstance(c.published, str) and c.published is not None
    ]
    seen = [c for c in published if not isinstance(c.published, str) and c.published is not None]
    for a, b in zip(evaluate_all(blind), evaluate_all(seen), strict=True):
        assert a.predicted == b.predicted, (b.claim.id, b.claim.quantity, b.claim.setting)


def test_every_claim_gets_a_verdict_with_a_reason_or_a_number(published: list[Claim]) -> None:
    for v in evaluate_all(published):
        assert (v.status == NOT_MODELLED) == (v.predicted is None)
        assert bool(v.reason) == (v.status == NOT_MODELLED)
        json.dumps(v.predicted, allow_nan=False)
    assert scores(evaluate_all(published[:5]))

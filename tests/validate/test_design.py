"""The design takes points that narrow the intervals, and sees to every kernel."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.calibration import shipped
from tests.validate.fake_suite import spec, suite
from validate.agenda import agenda, arch_of, planned
from validate.design import Candidate, design, prospect
from validate.fitting import SCALE

RNG = np.random.default_rng(4)


def points_of(count: int, rows: int) -> list[list[int]]:
    return [list(range(i * rows, (i + 1) * rows)) for i in range(count)]


def variance(slopes: np.ndarray, rows: list[int]) -> float:  # type: ignore[type-arg]
    used = slopes[rows]
    posterior = np.linalg.inv(np.eye(slopes.shape[1]) + used.T @ used)
    return float(np.einsum("ij,jk,ik->i", slopes, posterior, slopes).mean())


def test_the_variance_told_is_the_posteriors() -> None:
    slopes = RNG.normal(size=(60, 7))
    points = points_of(30, 2)
    found = design(slopes, points, ["a"] * 30, 10)
    for taken in (1, 5, 10):
        rows = [row for point in found.order[:taken] for row in points[point]]
        assert found.variances[taken - 1] == pytest.approx(variance(slopes, rows))


def test_chosen_points_beat_points_drawn_at_random() -> None:
    slopes = RNG.normal(size=(200, 12)) * np.logspace(0, -2, 12)
    found = design(slopes, points_of(200, 1), ["a"] * 200, 15)
    drawn = [variance(slopes, list(RNG.choice(200, 15, replace=False))) for _ in range(50)]
    assert found.variances[-1] < min(drawn)


def test_the_first_point_is_the_best_single_one() -> None:
    slopes = RNG.normal(size=(25, 4))
    found = design(slopes, points_of(25, 1), ["a"] * 25, 1)
    alone = [variance(slopes, [i]) for i in range(25)]
    assert found.order[0] == int(np.argmin(alone))


def test_every_point_stands_once_and_every_kernel_is_seen() -> None:
    slopes = RNG.normal(size=(90, 5))
    slopes[:30] *= 100  # one kernel that seems to matter more than all others
    slopes[60:] = 0.0  # one of which nothing is known
    kernels = ["a"] * 30 + ["b"] * 30 + ["c"] * 30
    found = design(slopes, points_of(90, 1), kernels, 30)
    assert sorted(found.order) == list(range(90))
    counts = {k: sum(kernels[i] == k for i in found.order[:30]) for k in "abc"}
    assert min(counts.values()) >= 3 and max(counts.values()) <= 25
    blind = [i - 60 for i in found.order[:30] if kernels[i] == "c"]
    assert blind[:2] == [0, 29]  # the ends of the grid first


def test_more_points_than_there_are_is_all_of_them() -> None:
    found = design(RNG.normal(size=(6, 2)), points_of(3, 2), ["a", "a", "b"], 100)
    assert sorted(found.order) == [0, 1, 2] and len(found.variances) == 3


def test_the_agenda_of_a_suite() -> None:
    plan = planned(suite(40), "h200-sxm", 90, 20)
    assert plan.num_points == 20 and len(plan.items) == 40
    assert {item.trial.kernel for item in plan.items} == {"gemm", "map"}
    assert all(item.seconds > 0 and item.cost_s > item.seconds for item in plan.items)
    sides = [
        (a.trial.case, b.trial.case) for a, b in zip(plan.items[::2], plan.items[1::2], strict=True)
    ]
    assert all(a == b for a, b in sides)  # implementations of one point stand side by side
    assert plan.variances[-1] < plan.variances[0]
    assert planned(suite(40), "h200-sxm", 90, 20) == plan


def test_slopes_are_those_that_a_fit_would_use() -> None:
    kernel = suite(10)[0]
    from validate.agenda import _candidates

    candidates, _, _, _ = _candidates([kernel], 90)
    found = prospect(candidates, "h100-sxm")
    assert found.slopes.shape[0] == 20 and np.isfinite(found.seconds).all()
    assert np.abs(found.slopes).max() * SCALE < 5  # no log time moves more than its constants
    assert (np.abs(found.slopes).sum(axis=1) > 0).all()
    without = [Candidate(c.trial, c.vendor, None, c.op) for c in candidates]
    assert np.isfinite(prospect(without, "h100-sxm").seconds).all()


def test_refused_implementations_are_no_trials() -> None:
    from dataclasses import replace

    kernel = suite(4)[0]
    ours, torch = kernel.implementations
    old = replace(kernel, implementations=(replace(ours, refusal=lambda c, a: "too old"), torch))
    plan = planned([old], "h200-sxm", 90, 10)
    assert {item.trial.implementation for item in plan.items} == {"torch"}
    assert {reason for _, reason in plan.skipped} == {"too old"}
    nothing = replace(kernel, implementations=(replace(ours, refusal=lambda c, a: "too old"),))
    assert planned([nothing], "h200-sxm", 90, 10).items == ()


def test_a_suite_that_cannot_be_read_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("validate.kernels.registry.FOLDERS", ("no_such_folder",))
    plan = agenda("quick", "h200-sxm")
    assert plan.items == () and plan.broken[0][0] == "no_such_folder"
    assert "ModuleNotFoundError" in plan.broken[0][1]


def test_architectures_and_donors() -> None:
    assert (arch_of("b200-sxm"), arch_of("a100-sxm4-80gb")) == (100, 80)
    assert shipped()  # the priors of the design
    assert spec("gemm", suite()[0].op, (), "gemm").grid == ()

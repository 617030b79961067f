"""Fits find the constants that made the data, and say which they could not find."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hwmodels.calibration import FittedConstant
from simulator.kernel_time import gemm
from tests.synthetic import gemm_rows
from validate.batches import batches
from validate.fitting import Fit, Problem, fit, problem_of
from validate.measurement import Measurement

TRUE = {
    "mma_frac": 0.72, "hbm_frac": 0.66, "feed_bytes_per_clk": 70.0, "store_bytes_per_clk": 11.0,
    "launch_s": 4.1e-6,
}  # fmt: skip


def problem(rows: list[Measurement]) -> Problem:
    seconds = np.array([r.seconds for r in rows], dtype=np.float64)
    return problem_of("h100-sxm", batches(rows)[0], seconds)


def values(found: Fit) -> dict[str, float]:
    """Constants as the rows' labels see them: base times factor."""
    return found.problem.values(0, found.theta)


@pytest.fixture(scope="module")
def found() -> Fit:
    return fit(problem(gemm_rows(count=600, noise=0.02, **TRUE)))


@pytest.mark.parametrize("name", TRUE)
def test_the_constants_that_made_the_data_are_found_again(found: Fit, name: str) -> None:
    tolerance = 0.25 if name == "store_bytes_per_clk" else 0.06
    assert values(found)[name] == pytest.approx(TRUE[name], rel=tolerance)


def test_predictions_are_as_exact_as_the_data(found: Fit) -> None:
    whole = found.problem
    errors = np.log(whole.predicted(found.theta) / whole.seconds)
    assert np.abs(errors).mean() < 0.025
    assert abs(errors.mean()) < 0.005


def test_slopes_are_those_of_differences(found: Fit) -> None:
    whole, theta = found.problem, found.theta
    exact = whole.jacobian(theta, whole.predicted(theta))
    for n in range(len(whole.slots)):
        moved = theta.copy()
        moved[n] += 1e-6
        slope = np.log(whole.predicted(moved) / whole.predicted(theta)) / 1e-6
        assert np.median(np.abs(exact[:, n] - slope)) < 1e-3


def test_an_outlier_moves_nothing(found: Fit) -> None:
    rows = gemm_rows(count=600, noise=0.02, **TRUE)
    rows[::20] = [dataclasses.replace(r, seconds=9 * (r.seconds or 0)) for r in rows[::20]]
    assert values(fit(problem(rows)))["mma_frac"] == pytest.approx(
        values(found)["mma_frac"], rel=0.03
    )


def status(found: Fit) -> dict[str, str]:
    constants: dict[str, FittedConstant] = found.constants(gemm.MODEL)
    return {name: c.status for name, c in constants.items()}


def test_what_the_rows_cannot_tell_is_said() -> None:
    large = [r for r in gemm_rows(count=900, **TRUE) if (r.seconds or 0) > 300e-6]
    found = status(fit(problem(large)))
    assert found["launch_s"] == found["split_s"] == "unidentified"
    assert found["mma_frac"] == "fitted"
    assert found["ragged_frac"] == "fixed"
    assert "host_s" not in found  # no row had an eager launch


def test_a_constant_pushed_to_its_bound_is_said() -> None:
    rows = [dataclasses.replace(r, seconds=0.35 * (r.seconds or 0)) for r in gemm_rows(count=400)]
    assert status(fit(problem(rows)))["mma_frac"] == "at bound"


def test_the_prior_rules_where_there_are_few_rows() -> None:
    rows = gemm_rows(count=12, noise=0.0, mma_frac=0.8)
    whole = problem(rows)
    moved = dataclasses.replace(whole, prior={("gemm", "tile_s"): 1e-6})
    assert values(fit(moved))["tile_s"] > 1.5 * values(fit(whole))["tile_s"]


def test_other_devices_rows_are_left_out() -> None:
    rows = gemm_rows(count=30) + gemm_rows("a100-sxm4-80gb", count=20)
    assert problem(rows).rows.tolist() == list(range(30))

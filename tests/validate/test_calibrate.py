"""From rows to a calibration: folds by shape, conformal widths, what others are worth."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from hwmodels.calibration import POOLED, Calibration, read_calibration
from tests.synthetic import gemm_rows
from validate.calibrate import (
    MOST_OF_A_KIND,
    as_document,
    calibrate,
    calibrate_all,
    fold,
    residuals_of,
    short_digest,
)
from validate.measurement import Measurement
from validate.transfer import ladder, with_transfer

H100 = {"mma_frac": 0.85, "launch_s": 3e-6}
A100 = {"mma_frac": 0.6, "launch_s": 6e-6, "hbm_frac": 0.7}


@pytest.fixture(scope="module")
def rows() -> list[Measurement]:
    return gemm_rows(count=260, noise=0.05, **H100) + gemm_rows(
        "a100-sxm4-80gb", count=260, noise=0.05, **A100
    )


@pytest.fixture(scope="module")
def fitted(rows: list[Measurement]) -> tuple[Calibration, ...]:
    found = calibrate_all(rows, ["h100-sxm", "a100-sxm4-80gb"], models=["gemm"])
    return with_transfer(found, rows)


def test_intervals_are_as_wide_as_the_noise(fitted: tuple[Calibration, ...]) -> None:
    pooled = fitted[0].models["gemm"].residuals[POOLED]
    # 80 % of a normal distribution lie within 1.28 standard deviations, 90 % within 1.64
    assert pooled.q80 == pytest.approx(0.05 * 1.2816, rel=0.2)
    assert pooled.q90 == pytest.approx(0.05 * 1.6449, rel=0.2)
    assert pooled.num_rows == 260


def test_elsewhere_is_less_sure(fitted: tuple[Calibration, ...]) -> None:
    for calibration in fitted:
        model = calibration.models["gemm"]
        assert model.transfer is not None
        assert model.transfer.q80 > 2 * model.residuals[POOLED].q80


def test_a_file_holds_the_digest_of_every_row_it_was_fitted_on(
    fitted: tuple[Calibration, ...], rows: list[Measurement], tmp_path: Path
) -> None:
    file = tmp_path / "h100-sxm.json"
    file.write_text(json.dumps(as_document(fitted[0])))
    read = read_calibration(file)
    assert read == fitted[0]
    assert read.rows == {short_digest(r) for r in rows if r.device_id == "h100-sxm"}


def test_a_row_is_known_again_whatever_it_measured(rows: list[Measurement]) -> None:
    again = dataclasses.replace(rows[0], seconds=1.0, family="other file")
    assert short_digest(again) == short_digest(rows[0])
    assert short_digest(dataclasses.replace(rows[0], gpu="T4")) != short_digest(rows[0])


def test_one_shape_stands_in_one_fold(rows: list[Measurement]) -> None:
    assert {fold(r) for r in rows} == set(range(5))
    for row in rows[:50]:
        assert fold(dataclasses.replace(row, source="another", dtype="fp16")) == fold(row)


@pytest.mark.parametrize("size", [20, 99, 1000])
def test_conformal_quantiles_cover(size: int) -> None:
    rng = np.random.default_rng(size)
    covered = [
        np.mean(np.abs(rng.normal(0, 1, 500)) <= residuals_of(rng.normal(0, 1, size)).q80)
        for _ in range(100)
    ]
    assert 0.79 < np.mean(covered) < 0.86


def test_residuals_of_perfect_predictions_stay_positive() -> None:
    assert residuals_of(np.zeros(30)).q80 > 0


def test_too_few_rows_fit_nothing(rows: list[Measurement]) -> None:
    assert not calibrate(rows[:15], "h100-sxm").models


def test_the_general_path_is_fitted_beside_the_models(rows: list[Measurement]) -> None:
    found = calibrate(rows[:120], "h100-sxm")
    assert set(found.models) == {"gemm", "general"}
    assert found.models["general"].residuals[POOLED].num_rows == MOST_OF_A_KIND


def test_a_few_rows_buy_most_of_what_many_do(rows: list[Measurement]) -> None:
    donors = calibrate_all(rows, ["a100-sxm4-80gb"], models=["gemm"])
    (step,) = ladder(rows, "h100-sxm", 30, models=["gemm"], donors=donors)
    assert step.borrowed_mape is not None
    assert step.all_mape <= step.few_mape * 1.05 < step.borrowed_mape
    assert step.few_mape < 0.08
    assert step.num_fitted == 30 and step.num_held_out > 60


def test_a_device_is_no_donor_to_its_own_ladder(rows: list[Measurement]) -> None:
    donors = calibrate_all(rows, ["h100-sxm"], models=["gemm"])
    (step,) = ladder(rows, "h100-sxm", 30, models=["gemm"], donors=donors)
    assert step.borrowed_mape is None


def test_more_rows_than_there_are_show_no_ladder(rows: list[Measurement]) -> None:
    assert ladder(rows, "h100-sxm", 5000, donors=()) == ()


def test_log_widths_are_finite(fitted: tuple[Calibration, ...]) -> None:
    for calibration in fitted:
        for model in calibration.models.values():
            assert all(math.isfinite(r.q90) for r in model.residuals.values())

"""Records fitted: constants found again, coverage on held-out rows, what is left out and why."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from hwmodels.calibration import Calibration
from hwmodels.errors import InputError
from simulator.kernel_time.streaming import MODEL as STREAMING
from tests.synthetic import gemm_rows
from tests.validate.made_records import DEVICE, GPU, grid, records_of, truth
from validate.calibrate import Trace, calibrate
from validate.compare import compare, errors
from validate.fit_report import (
    FEW,
    IMPLAUSIBLE,
    FitReport,
    Usable,
    by_regime,
    fit_report,
    log_widths,
    usable,
)
from validate.record import Record
from validate.recorded import TOO_NOISY, TOO_SLOW, measurements

KERNELS = ("gemm", "copy", "triad", "elementwise", "swiglu", "softmax", "rmsnorm", "layernorm")


@lru_cache(maxsize=1)
def all_records() -> tuple[Record, ...]:
    return tuple(records_of(grid(KERNELS)))


def split() -> tuple[list[Record], list[Record]]:
    """Half to fit on, by shape; the rest is what a full profile adds."""
    mine = [r for r in all_records() if sum(map(ord, r.case.key)) % 2 == 0]
    known = {r.trial.key for r in mine}
    return mine, [r for r in all_records() if r.trial.key not in known]


@lru_cache(maxsize=1)
def fitted() -> tuple[FitReport, Usable]:
    found = usable(split()[0], {})
    models = ("gemm", "streaming")
    return fit_report(found.rows, DEVICE, models=models, left_out=found.left_out), found


def test_constants_are_found_again_within_their_doubt() -> None:
    """Products made from the nominal model with two constants changed, 3 % noise."""
    true = {"mma_frac": 0.6, "hbm_frac": 0.7}
    rows = gemm_rows(count=120, noise=0.03, **true)
    traces: list[Trace] = []
    found = calibrate(rows, "h100-sxm", models=["gemm"], trace=traces.append)
    (trace,) = traces
    widths = log_widths(trace.fit)
    for name, value in true.items():
        off = abs(np.log(found.models["gemm"].constants[name].value / value))
        assert off < 2 * widths["gemm", name], name
        assert widths["gemm", name] < 0.2
    spread = float(np.nanstd(trace.errors))
    assert 0.02 < spread < 0.045  # the noise, and little beside it


def test_a_device_s_own_constants_are_found_again() -> None:
    report, _ = fitted()
    model = next(m for m in report.models if m.model == "streaming")
    true = truth().models["streaming"].constants
    for name in ("hbm_frac",):
        value, width = model.learned[name]
        assert abs(np.log(value / true[name].value)) < 2 * width
    assert model.n > 40 and model.mape is not None and model.mape < 0.05
    assert set(model.learned).isdisjoint(model.open) and STREAMING.name == "streaming"


def test_held_out_rows_are_predicted_and_covered() -> None:
    report, _ = fitted()
    rest = measurements(split()[1])
    found = compare(rest, calibrations=(report.calibration,))
    assert len(found.points) == len(rest)
    told = errors(found.points)
    assert told.mape is not None and told.mape < 0.05
    assert told.coverage_90 is not None and abs(told.coverage_90 - 0.9) <= 0.04, told


def test_rows_that_were_fitted_on_are_no_evidence() -> None:
    report, found = fitted()
    again = compare(found.rows, calibrations=(report.calibration,))
    assert len(again.points) == 0
    assert {u.reason for u in again.unsupported} == {"own row: the calibration was fitted on it"}
    assert sum(u.n for u in again.unsupported) == len(found.rows)


def test_the_report_accounts_for_every_record() -> None:
    records = list(split()[0])
    records[0] = replace(records[0], flags=("noisy",))
    records[1] = replace(records[1], flags=("throttled",))
    records[2] = replace(records[2], seconds=records[2].seconds * 1e-3)
    records[3] = replace(records[3], kernel="nothing", row=None)
    stray = replace(records[4].environment, gpu="NVIDIA Z9")
    records[4] = replace(records[4], environment=stray)
    found = usable(records, {})
    assert sum(found.left_out.values()) + len(found.rows) == len(records)
    for reason in (TOO_NOISY, TOO_SLOW, IMPLAUSIBLE, "the GPU is in no catalogue"):
        assert found.left_out[reason] == 1, reason
    assert any("no kernel nothing" in reason for reason in found.left_out)


def test_points_carry_regimes_and_intervals() -> None:
    report, found = fitted()
    points = report.points
    assert len(points) == len(report.regimes) == len(found.rows) - report.left_out.get(FEW, 0)
    assert np.all(points.low_90_s < points.predicted_s)
    assert np.all(points.predicted_s < points.high_90_s)
    assert set(by_regime(report).family) == set(report.regimes) > {"hbm"}


def test_too_few_rows_of_any_model_are_refused() -> None:
    rows = measurements(list(all_records())[:5])
    with pytest.raises(InputError, match="profile more"):
        fit_report(rows, DEVICE)


def test_the_made_device_differs_from_its_kin() -> None:
    assert isinstance(truth(), Calibration) and truth().device_id == DEVICE
    assert all(r.environment.gpu == GPU for r in all_records())

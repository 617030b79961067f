"""Rows become predictions: sums over parts, provenance, and a reason for every row without."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import validate.predictions
from hwmodels import catalog
from hwmodels.errors import InputError
from simulator.kernel_time.predict import Prediction
from simulator.kernel_time.predict import predict as predict_op
from tests.validate.data import EXAMPLES, example, made_calibration
from validate.adapters import Uncounted, parts
from validate.compare import compare
from validate.measurement import Measurement
from validate.predictions import NO_TIME, fitted_on, predict

H100 = catalog.device("h100-sxm")


def test_a_batch_of_sizes_gives_what_single_rows_give() -> None:
    rows = [example("attn_prefill", params={"seq_q": s, "seq_kv": s}) for s in (1, 77, 4096)]
    rows += [example("gemm", params={"m": m}) for m in (1, 1000, 65536)]
    together = predict(rows)
    alone = [predict([r]) for r in rows]
    for name in ("lower_s", "warm_s", "seconds", "low_80_s", "high_90_s"):
        single = [float(getattr(p, name)[0]) for p in alone]
        assert getattr(together, name) == pytest.approx(single, rel=1e-12)


def test_a_row_of_several_parts_adds_times_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = parts(example("gemm"))[0], parts(example("softmax"))[0]
    monkeypatch.setattr("validate.batches.parts", lambda row: (one, other, one))
    found = predict([example("gemm")])
    each = [
        predict_op(p.op(**dict(p.fixed), **p.sizes), on=H100, conditions=p.conditions)
        for p in (one, other, one)
    ]
    assert found.seconds[0] == pytest.approx(sum(p.seconds for p in each))
    for level, name in ((80, "80"), (90, "90")):
        low, high = zip(*(p.interval(level) for p in each), strict=True)
        assert getattr(found, f"low_{name}_s")[0] == pytest.approx(sum(low))
        assert getattr(found, f"high_{name}_s")[0] == pytest.approx(sum(high))
    assert found.models(0) == tuple(dict.fromkeys(p.model for p in each))


def test_the_least_sure_part_names_scope_and_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    both = (parts(example("gemm"))[0], parts(example("softmax"))[0])
    monkeypatch.setattr("validate.batches.parts", lambda row: both)
    found = predict([example("gemm")], [made_calibration("h100-sxm")])
    assert (found.scope(0), found.rung(0), found.donors(0)) == ("nominal", "model", ("h100-sxm",))


def test_intervals_nest_around_the_prediction() -> None:
    found = predict([example(op) for op in EXAMPLES])
    assert found.reasons == (None,) * len(EXAMPLES)
    ends = (found.low_90_s, found.low_80_s, found.seconds, found.high_80_s, found.high_90_s)
    assert np.all(np.diff(ends, axis=0) > 0)


def test_sizes_an_op_refuses_do_not_take_their_neighbours_along() -> None:
    rows = [example("gemm", params={"m": m}) for m in (1, 2, 3, 4, 5)]
    refused = dataclasses.replace(rows[3], params={**rows[3].params, "m": 0.5})
    found = predict([*rows[:3], refused, rows[4]])
    assert [r is None for r in found.reasons] == [True, True, True, False, True]
    assert "matmul refuses the sizes" in str(found.reasons[3])
    assert np.isnan(found.lower_s[3]) and np.isnan(found.seconds[3])


def test_sizes_a_model_refuses_do_not_take_their_neighbours_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusing(op: Any, **rest: Any) -> Prediction:
        if np.any(np.asarray(op.m) == 4):
            raise InputError("not four")
        return predict_op(op, **rest)

    monkeypatch.setattr(validate.predictions, "predict_op", refusing)
    found = predict([example("gemm", params={"m": m}) for m in (1, 2, 3, 4, 5)])
    assert [r is None for r in found.reasons] == [True, True, True, False, True]
    assert found.reasons[3] == "matmul refuses the sizes: not four"
    alone = predict([example("gemm", params={"m": 5})])
    assert found.seconds[4] == pytest.approx(alone.seconds[0])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0, -1.0])
def test_a_prediction_that_is_no_time_is_a_reason(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(op: Any, **rest: Any) -> Prediction:
        return dataclasses.replace(predict_op(op, **rest), seconds=wrong * np.ones(1))

    monkeypatch.setattr(validate.predictions, "predict_op", broken)
    assert predict([example("gemm")]).reasons == (NO_TIME,)


def test_a_prediction_without_a_bound_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate.predictions, "_bound", lambda batch, device: None)
    (table,) = compare([example("gemm")]).tables
    assert (table.n, table.roofline_mape, table.faster_than_bound) == (1, None, 0)
    assert table.mape is not None


def test_a_bound_without_a_prediction_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    from hwmodels.errors import UnsupportedError

    def rateless(op: Any, **rest: Any) -> Prediction:
        raise UnsupportedError("no rate")

    monkeypatch.setattr(validate.predictions, "predict_op", rateless)
    result = compare([example("gemm")])
    assert [(t.n, t.unsupported) for t in result.tables] == [(0, 1)]
    assert result.unsupported[0].reason == "no rate"


def test_withholding_a_devices_own_calibration_leaves_the_others() -> None:
    known = [made_calibration("h100-sxm"), made_calibration("a100-sxm4-80gb")]
    row = example("gemm")
    assert predict([row], known).donors(0) == ("h100-sxm",)
    found = predict([row], known, withhold_own=True)
    assert (found.donors(0), found.scope(0)) == (("a100-sxm4-80gb",), "mean")


def test_fitted_rows_are_found_by_what_they_say() -> None:
    row = example("gemm")
    mine = [made_calibration("h100-sxm", rows=[row])]
    again = dataclasses.replace(row, seconds=2.0, family="other file")
    rows = [row, again, example("gemm", params={"m": 5})]
    assert fitted_on(rows, predict(rows, mine), mine) == ("h100-sxm", "h100-sxm", None)


def test_a_flag_is_the_first_note() -> None:
    row = example("fancy_product", params=example("gemm").params)
    found = predict([row])
    (flag,) = found.flags(0)
    assert flag and found.notes(0)[0] == flag
    assert predict([example("gemm")]).flags(0) == ()


ODD = (None, "odd", [1], {}, 0, 1.5, 1e15, True)
SOURCES = ("", "x", "a/b", "aic/x", "aic/vllm-1/never-heard-of", "/")


def odd_rows(row: Measurement) -> list[Measurement]:
    """The row with each of its params missing or odd, and from unheard-of sources."""
    changed = [dataclasses.replace(row, source=s) for s in SOURCES]
    changed += [dataclasses.replace(row, dtype=d) for d in ("fp32", "nvfp4", "fp8_block", "amp")]
    for name in row.params:
        rest = {k: v for k, v in row.params.items() if k != name}
        changed.append(dataclasses.replace(row, params=rest))
        changed += [dataclasses.replace(row, params={**rest, name: value}) for value in ODD]
    return changed


@pytest.mark.parametrize("op", sorted(EXAMPLES))
def test_an_odd_row_is_priced_or_given_up_and_never_a_crash(op: str) -> None:
    rows = odd_rows(example(op))
    for row in rows:
        try:
            parts(row)
        except Uncounted as why:
            assert str(why)
    found = predict(rows)
    told = [r is not None for r in found.reasons]
    assert list(np.isnan(found.seconds)) == told


def test_odd_forms_of_published_rows_are_never_a_crash(shared_data: Path) -> None:
    from validate.measurement import csv_files, read

    first: dict[tuple[str, str], Measurement] = {}
    for path in csv_files(shared_data / "test"):
        for row in read(path).rows:
            first.setdefault((row.op, row.dtype), row)
    rows = [odd for row in first.values() for odd in odd_rows(row)]
    rows = [r for r in rows if json.dumps(dict(r.params)) is not None]
    assert len(predict(rows).reasons) == len(rows) > 1000

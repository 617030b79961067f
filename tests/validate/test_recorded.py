"""Records become rows that calibrate; a profile replayed calibrates and validates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from simulator.kernel_time.model import COLD, REPLAYED
from tests.validate.fake_suite import GPU, record_of, seconds_of, suite, trials
from validate.adapters import parts
from validate.agenda import planned
from validate.calibrate import calibrate
from validate.compare import compare
from validate.record import Case, Record, Trial
from validate.recorded import TOO_NOISY, TOO_SLOW, measurements, recorded, source_of
from validate.session import read_store, session
from validate.timer import ReplayTimer

TRIAL = trials(2)[0]


def row_of(record: Record):  # type: ignore[no-untyped-def]
    (row,) = measurements([record])
    return row


def test_a_record_is_the_row_that_its_kernel_names() -> None:
    row = row_of(record_of(TRIAL))
    assert (row.family, row.op, row.dtype) == ("gemm", "gemm", "bf16")
    assert row.params == TRIAL.case.params and row.seconds == seconds_of(TRIAL)
    assert row.device_id == "h100-sxm" and row.source == "ridgeplan/triton/rotated"


@pytest.mark.parametrize(
    ("vendor", "implementation", "state", "method", "kernel", "l2", "host"),
    [
        ("", "triton", "rotated", "graph", "ridgeplan:triton", COLD, ""),
        ("", "triton-tma", "cold", "graph", "ridgeplan:triton-tma", COLD, ""),
        ("cublas", "torch", "warm", "graph", "cublas", REPLAYED, ""),
        ("", "torch-fft", "warm", "events", "torch-fft", REPLAYED, "eager"),
    ],
)
def test_the_run_is_as_it_was_timed(
    vendor: str, implementation: str, state: str, method: str, kernel: str, l2: str, host: str
) -> None:
    record = record_of(TRIAL)
    record = replace(
        record,
        implementation=implementation,
        vendor=vendor,
        method=method,
        environment=replace(record.environment, l2_state=state),
    )
    (part,) = parts(row_of(record))
    assert part.conditions.kernel == kernel
    assert (part.conditions.l2, part.conditions.host) == (l2, host)


def test_collectives_keep_their_layout() -> None:
    case = Case(op="all_reduce", dtype="bf16", params={"nodes": 1, "gpus": 8, "bytes": 2**20})
    record = replace(
        record_of(TRIAL),
        case=case,
        kernel="collectives",
        implementation="nccl",
        vendor="",
        row={"family": "collectives", "op": "all_reduce", "params": dict(case.params)},
    )
    row = row_of(record)
    assert row.dtype == "" and row.source == "ridgeplan/nccl/bf16"
    (part,) = parts(row)
    assert part.op.__name__ == "CollectiveTransfer" and part.conditions.kernel == "nccl"


def test_what_is_left_out_has_a_reason() -> None:
    fine, other = record_of(TRIAL), record_of(trials(2)[1])
    stray = replace(other, environment=replace(other.environment, gpu="NVIDIA Z9"))
    noisy, hot = replace(other, flags=("noisy",)), replace(other, flags=("throttled",))
    found = recorded([fine, stray, noisy])
    assert found.records == (fine, noisy)
    assert [reason for _, reason in found.left_out] == ["the GPU is in no catalogue"]
    strict = recorded([fine, noisy, hot], noisy=False)
    assert len(strict.rows) == 1
    assert [reason for _, reason in strict.left_out] == [TOO_NOISY, TOO_SLOW]
    assert recorded([stray], {"NVIDIA Z9": "h200-sxm"}).rows[0].device_id == "h200-sxm"
    assert source_of("triton", "", "warm") == "ridgeplan/triton/warm"


def test_a_case_that_no_table_names_is_a_row_of_its_kernel() -> None:
    row = row_of(replace(record_of(TRIAL), kernel="triad", row=None))
    assert (row.family, row.op, row.dtype) == ("triad", "kernel:triad:gemm", "bf16")
    assert row.params == TRIAL.case.params


def test_profile_calibrate_validate_on_a_replay(tmp_path: Path) -> None:
    quick = planned(suite(60), "h100-sxm", 90, 40)
    truth = ReplayTimer([record_of(trial) for trial in trials(60)])
    session(quick.items, truth, tmp_path / "quick", deadline_s=1e18)
    rows = measurements(read_store(tmp_path / "quick").records)
    fitted = calibrate(rows, "h100-sxm")
    assert {"gemm", "streaming"} <= set(fitted.models)

    full = planned(suite(60), "h100-sxm", 90, 10**6)
    session(full.items, truth, tmp_path / "full", deadline_s=1e18)
    known = {r.trial.key for r in read_store(tmp_path / "quick").records}
    held_out = [r for r in read_store(tmp_path / "full").records if r.trial.key not in known]
    assert len(held_out) == len(full.items) - len(known) > 60
    found = compare(measurements(held_out), calibrations=(fitted,))
    assert sum(table.n for table in found.tables) == len(held_out)
    for table in found.tables:
        assert table.mape is not None and table.mape < 0.05, table
    again = compare(rows, calibrations=(fitted,))
    assert not sum(table.n for table in again.tables)  # fitted on, so no evidence


def test_trials_of_the_suite_have_their_own_keys() -> None:
    assert len({trial.key for trial in trials(5)}) == len(trials(5))
    assert str(Trial(kernel="a", implementation="b", case=Case(op="c", dtype="d", params={}))) == (
        "a/b d "
    )
    assert record_of(TRIAL).environment.gpu == GPU

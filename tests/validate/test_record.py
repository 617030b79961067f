"""Records survive a killed writer, and a replayed record is the one that was stored."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from hwmodels.errors import InputError
from validate.record import (
    Case,
    Environment,
    Record,
    RecordWriter,
    Refused,
    Trial,
    digest,
    read_records,
    read_refused,
)
from validate.timer import ReplayTimer, Timer, Unmeasured

ENVIRONMENT = Environment(
    gpu="H100-SXM-80GB",
    sm_clock_hz=1.755e9,
    memory_clock_hz=2.619e9,
    driver="570.86",
    versions={"cuda": "12.8"},
    l2_state="cold",
)


def record(m: int, seconds: float = 1e-5) -> Record:
    return Record(
        case=Case(op="gemm", dtype="bf16", params={"m": m, "n": 64}),
        environment=ENVIRONMENT,
        seconds=seconds,
        repetitions=100,
        spread_frac=0.02,
        measured_at="2026-11-21T02:00:00Z",
    )


def write(path: Path, *records: Record) -> Path:
    with RecordWriter(path) as writer:
        for r in records:
            writer.append(r)
    return path


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", record(1), record(2))
    write(path, record(3))
    found = read_records(path)
    assert found.records == (record(1), record(2), record(3))
    assert found.torn == ()


def test_a_record_is_on_the_disk_before_append_returns(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "r.jsonl") as writer:
        writer.append(record(1))
        assert read_records(tmp_path / "r.jsonl").records == (record(1),)


def test_wherever_the_writer_is_killed_only_the_last_record_is_at_stake(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", record(1), record(2))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        complete = cut == len(whole) - 1  # only the line's end is missing
        expected = (record(1), record(2)) if complete else (record(1),)
        found = read_records(path)
        assert found.records == expected
        assert found.torn == (() if complete or cut == start else (2,))
        write(path, record(3))  # the next run resumes
        found = read_records(path)
        assert found.records == (*expected, record(3))
        assert found.torn == (() if complete or cut == start else (2,))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[1]", "expected the fields"),
        ("{}", "expected the fields"),
        (record(1).line().replace('{"m":1,"n":64}', "[1,64]"), "params is no JSON object"),
        (record(1).line().replace('"version":2', '"version":9'), "version 9 is unknown"),
        (record(1).line().replace('"version":2', '"version":1'), "expected the fields"),
        (record(1).line().replace('"flags":[]', '"flags":{}'), "flags or tried"),
        (record(1).line().replace('"row":null', '"row":{}'), "family, op and params"),
        (record(1).line().replace('"gpu":', '"gpux":'), "environment: expected the fields"),
        (record(1).line().replace("cold", "tepid"), "l2_state 'tepid' is unknown"),
        (record(1).line().replace('"seconds":1e-05', '"seconds":-1'), "seconds = -1"),
        (record(1).line().replace('"seconds":1e-05', '"seconds":"fast"'), "mend or remove"),
        (record(1).line().replace('"repetitions":100', '"repetitions":0'), "repetitions = 0"),
        (record(1).line().replace('"spread_frac":0.02', '"spread_frac":-1'), "spread_frac = -1"),
    ],
)
def test_a_line_that_is_json_but_no_record_raises(
    tmp_path: Path, line: str, expected: str
) -> None:  # fmt: skip
    path = tmp_path / "r.jsonl"
    path.write_text(f"{record(2).line()}\n{line}\n")
    with pytest.raises(InputError) as caught:
        read_records(path)
    assert f"{path}: line 2" in str(caught.value)
    assert expected in str(caught.value)


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")


def test_digests_name_the_content_and_not_the_order() -> None:
    a, b = record(1), record(2)
    assert a.digest == hashlib.sha256(a.line().encode()).hexdigest()
    assert digest([a, b]) == digest([b, a])
    assert digest([a, b]) != digest([a, dataclasses.replace(b, seconds=2e-5)])
    assert digest([a]) != digest([a, a])


def test_replay_answers_what_was_recorded_last() -> None:
    timer: Timer = ReplayTimer([record(1), record(2), record(1, 3e-5)])
    assert timer.measure(trial(1)).seconds == 3e-5
    assert timer.environment == ENVIRONMENT
    with pytest.raises(InputError, match="no record of gemm/ bf16 n=64 m=3"):
        timer.measure(trial(3))


def test_replay_repeats_refusals_and_needs_records() -> None:
    entry = Refused(trial=trial(7), gpu="g", kind="memory", reason="out of memory", measured_at="t")
    timer = ReplayTimer([record(1)], [entry])
    with pytest.raises(Unmeasured, match="out of memory") as caught:
        timer.measure(trial(7))
    assert caught.value.kind == "memory"
    with pytest.raises(InputError, match="nothing to replay"):
        ReplayTimer([])


def test_refusals_come_back_as_they_were(tmp_path: Path) -> None:
    entry = Refused(trial=trial(7), gpu="g", kind="wrong", reason="error 0.3", measured_at="t")
    with RecordWriter(tmp_path / "refusals.jsonl") as writer:
        writer.append(entry)
    assert read_refused(tmp_path / "refusals.jsonl") == (entry,)
    assert read_refused(tmp_path / "none.jsonl") == ()
    with pytest.raises(InputError, match="kind 'odd' is unknown"):
        Refused(trial=trial(7), gpu="g", kind="odd", reason="", measured_at="t")


OLD_LINE = (
    '{"case":{"dtype":"bf16","op":"gemm","params":{"m":1,"n":64}},"environment":{"driver":"570.86",'
    '"gpu":"H100-SXM-80GB","l2_state":"cold","memory_clock_hz":2619000000.0,"sm_clock_hz":'
    '1755000000.0,"versions":{"cuda":"12.8"}},"measured_at":"2026-11-21T02:00:00Z","repetitions":'
    '100,"seconds":1e-05,"spread_frac":0.02,"version":1}'
)


def test_lines_of_version_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(OLD_LINE + "\n" + record(2).line() + "\n")
    old, new = read_records(path).records
    assert old == record(1) and new == record(2)
    assert old.trial.kernel == "gemm" and old.half_width_frac is None


def trial(m: int) -> Trial:
    return Trial(
        kernel="gemm",
        implementation="",
        case=Case(op="gemm", dtype="bf16", params={"n": 64, "m": m}),
    )

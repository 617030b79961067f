"""`ridgeplan records show|merge|check|import` and `ridgeplan profile`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cli.main import main
from tests.synthetic import gemm_rows, write_rows
from tests.validate.fake_suite import record_of, trials
from validate.record import Record, RecordWriter, Refused, read_records

RECORDS = [record_of(trial) for trial in trials(3)[:4]]


def write(folder: Path, *records: Record, tail: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    with RecordWriter(folder / "records.jsonl") as writer:
        for record in records:
            writer.append(record)
    with (folder / "records.jsonl").open("ab") as file:
        file.write(tail)
    return folder


def refuse(folder: Path) -> None:
    entry = Refused(
        trial=trials(3)[5], gpu="x", kind="memory", reason="out of memory", measured_at=""
    )
    with RecordWriter(folder / "refusals.jsonl") as writer:
        writer.append(entry)


def test_a_table_by_kernel_and_implementation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "a", *RECORDS, replace(RECORDS[0], flags=("noisy",), low_s=1e-6,
                   high_s=2e-3))  # fmt: skip
    refuse(folder)
    assert main(["records", "show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "gemm on H100-SXM-80GB" in out and "torch" in out and "noisy" in out and "%" in out
    assert "1 refused; the first: gemm/torch" in out and "out of memory" in out
    assert main(["records", "show", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first = found["records"][0]
    assert first["seconds"] == RECORDS[0].seconds and 0 < first["bound_frac"] <= 1
    assert found["refused"][0]["kind"] == "memory"


def test_merging_is_a_union(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", *RECORDS[:3], tail=b'{"half')
    b = write(tmp_path / "b", *RECORDS[1:], replace(RECORDS[0], seconds=1.0))
    out = tmp_path / "out.jsonl"
    assert main(["records", "merge", str(a), str(b), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["doubled"]) == (5, 2)
    assert read_records(out).records == (*RECORDS, replace(RECORDS[0], seconds=1.0))
    assert main(["records", "merge", str(out), str(out), "--out", str(out)]) == 0
    assert "wrote 5 records" in capsys.readouterr().out


def test_a_sound_file_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "a", *RECORDS, tail=b'{"half')
    assert main(["records", "check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "warning: torn:" in out and "line 5" in out and "0 errors, 1 warnings" in out


def test_what_is_odd_is_told_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stray = replace(RECORDS[3], environment=replace(RECORDS[3].environment, gpu="NVIDIA Z9"))
    fast = replace(RECORDS[1], seconds=1e-9)
    folder = write(tmp_path / "a", RECORDS[0], RECORDS[0], RECORDS[1], fast, stray)
    assert main(["records", "check", str(folder), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["fit"]
    told = {(f["kind"], f["line"], f["error"]) for f in found["findings"]}
    assert told == {
        ("doubled", 2, True),
        ("repeated", 4, False),
        ("implausible", 4, True),
        ("device", None, True),
        ("device", None, False),
    }


def test_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "kernels_gemm.csv", gemm_rows(count=9))
    out = tmp_path / "out.jsonl"
    assert main(["records", "import", str(file), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 9
    assert len(read_records(out).records) == 9
    assert main(["records", "show", str(out)]) == 0
    assert "imported" in capsys.readouterr().out


def test_profile_replays_with_the_same_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from validate import profile

    monkeypatch.setattr(profile, "WORKER", "tests.validate.fake_worker")
    out = tmp_path / "out"
    out.mkdir()
    (out / "script").write_text("ok ok ok")
    assert main(["profile", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["measured"] == 3
    assert captured.err.count(" us") == 3
    assert len(read_records(out / "records.jsonl").records) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["records", "show", "nowhere"], "no such file of records"),
        (["records", "show", "A", "-k", "none"], "no record of none"),
        (["records", "merge", "A", "--out", "nowhere/x"], "no folder"),
        (["records", "check", "NEWER"], "version 9 is unknown"),
        (["records", "import", "nowhere", "--out", "x"], "no such file or folder"),
        (["records", "import", "STEPS", "--out", "x"], "nothing to import: a whole step"),
        (["profile", "--out", "A"], "holds 4 records already; give --resume"),
        (["profile", "--out", "B", "--suite", "slow"], "--suite slow: it is quick or full"),
        (["profile", "--out", "A/records.jsonl"], "is a file; give a folder"),
        (["profile", "--out", "B", "--replay", "nowhere"], "no such file"),
    ],
)
def test_refusals_are_one_line(
    tmp_path: Path,
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("A"), *RECORDS)
    Path("NEWER").write_text(RECORDS[0].line().replace('"version":2', '"version":9') + "\n")
    steps = Path("STEPS")
    steps.mkdir()
    (steps / "steps_training.csv").write_text(
        "source,gpu,n_gpus,model,parallelism,precision,metric,value\n"
        "x,H100-SXM-80GB,8,{},{},bf16,step_time_s,1.0\n"
    )
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and len(err.strip().splitlines()) == 1

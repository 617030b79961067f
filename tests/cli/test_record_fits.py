"""`calibrate` and `validate` on records: the main path, and what each refuses in one line."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest

from cli.main import main
from hwmodels.calibration import read_calibration
from tests.validate.made_records import GPU, grid, records_of, written
from validate.record import Record, RecordWriter, Refused
from validate.session import REFUSALS


@lru_cache(maxsize=1)
def products() -> tuple[Record, ...]:
    return tuple(records_of(grid(["gemm"]), noise=0.01))


@pytest.fixture()
def quick(tmp_path: Path) -> Path:
    return written(tmp_path / "quick", list(products()[::3]))


@pytest.fixture()
def full(tmp_path: Path) -> Path:
    return written(tmp_path / "full", list(products()))


def test_quick_calibrates_and_full_judges(
    quick: Path, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RecordWriter(quick / REFUSALS) as writer:
        trial = products()[1].trial
        writer.append(Refused(trial=trial, gpu=GPU, kind="compile", reason="x", measured_at="now"))
    command = ["calibrate", str(quick), "-d", "h200-sxm", "-m", "gemm", "--out", str(tmp_path)]
    page = tmp_path / "fit.html"
    assert main([*command, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "gemm" in out and "mma_frac" in out and "±" in out and "left out" in out
    assert "refused when it was profiled: compile" in out
    text = page.read_text()
    assert "Predicted over measured time" in text and "by the largest term" in text
    assert "error_y" in text and "refused when it was profiled" in text
    made = read_calibration(tmp_path / "h200-sxm.json")
    assert len(made.rows) == len(products()[::3])

    judged = ["validate", str(full), "--calibration", str(tmp_path / "h200-sxm.json"), "--json"]
    assert main(judged) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(t["n"] for t in found["tables"]) == len(products()) - len(made.rows)
    (own,) = {u["reason"] for u in found["unsupported"]}
    assert "fitted on" in own and sum(u["n"] for u in found["unsupported"]) == len(made.rows)
    (family,) = found["families"]
    assert family["family"] == "gemm" and family["mape"] < 0.08
    assert 0.8 < family["coverage_90"] <= 1.0


def test_the_fit_as_json(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(quick), "-m", "gemm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (fit,) = found["fits"]
    assert fit["device"] == "h200-sxm" and fit["rows"] == len(products()[::3])
    (model,) = fit["models"]
    assert model["model"] == "gemm" and model["n"] > 10 and "mma_frac" in model["learned"]
    assert "rows" not in found["calibrations"][0]


def test_a_torn_last_line_is_said_and_the_rest_used(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (quick / "records.jsonl").open("ab") as file:
        file.write(products()[1].line().encode()[:99])
    assert main(["calibrate", str(quick), "-m", "gemm", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "half a line" in err and len(err.strip().splitlines()) == 1
    assert json.loads(out)["fits"][0]["rows"] == len(products()[::3])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that ends with 2 and one line."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.strip().splitlines()) == 1, err
    return err


def test_records_of_another_device(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "calibrate", str(quick), "-d", "h100-sxm")
    assert "h200-sxm (NVIDIA H200)" in said and "none of h100-sxm" in said


def test_records_of_no_known_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = products()[0].line().replace(GPU, "NVIDIA Z9")
    (tmp_path / "records.jsonl").write_text(line + "\n")
    assert "'NVIDIA Z9=DEVICE'" in refused(capsys, "calibrate", str(tmp_path))
    said = refused(capsys, "calibrate", str(tmp_path), "-d", "NVIDIA Z9=h200-sxm")
    assert "profile more" in said  # known now, and one row is too few


def test_another_schema_version(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = quick / "records.jsonl"
    path.write_text(path.read_text().replace('"version":2', '"version":9', 1))
    for command in ("calibrate", "validate"):
        said = refused(capsys, command, str(quick))
        assert "version 9" in said and "records.jsonl: line 1" in said


def test_what_makes_no_sense(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "records.jsonl").write_text("")
    assert "no record" in refused(capsys, "calibrate", str(empty))
    assert "one --device" in refused(
        capsys, "calibrate", str(quick), "-d", "h200-sxm", "-d", "h100-sxm"
    )
    assert "no family 'x'" in refused(capsys, "validate", str(quick), "--family", "x")
    assert "folder" in refused(capsys, "calibrate", str(quick), "--html", "no/where.html")


def test_a_folder_of_profiles_is_one(
    quick: Path, full: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", str(quick.parent), "-m", "gemm", "--json"]
    assert main(command) == 0  # the same lines in both count once
    assert json.loads(capsys.readouterr().out)["fits"][0]["rows"] == len(products())

"""`ridgeplan calibrate`: tables, files, ladders, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from hwmodels.calibration import read_calibration
from tests.synthetic import gemm_rows, write_rows


@pytest.fixture()
def measured(tmp_path: Path) -> Path:
    folder = tmp_path / "measured"
    folder.mkdir()
    write_rows(folder / "kernels_gemm.csv", gemm_rows(count=150))
    return folder


def test_a_fit_is_shown_and_written(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(measured), "-m", "gemm", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "h100-sxm" in out and "gemm" in out and "±" in out
    found = read_calibration(tmp_path / "h100-sxm.json")
    assert found.device_id == "h100-sxm" and found.models["gemm"].num_rows == 150
    assert len(found.rows) == 150


def test_json(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(measured), "-m", "gemm", "--json", "--prior", "nominal"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == 1
    (calibration,) = found["calibrations"]
    assert calibration["device"] == "h100-sxm" and "rows" not in calibration
    constant = calibration["models"]["gemm"]["constants"]["mma_frac"]
    assert set(constant) == {"value", "status", "factors"}


def test_a_ladder(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", str(measured), "-m", "gemm", "--rows", "20"]
    assert main(command) == 0
    assert "20 rows" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert step["model"] == "gemm" and step["num_fitted"] == 20
    assert 0 < step["all_mape"] <= step["few_mape"] * 1.2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-d", "t4"], "no row of t4"),
        (["-d", "h100-smx"], "h100-smx"),
        (["-m", "gem"], "gem"),
        (["--rows", "3"], "too few"),
        (["--rows", "9999"], "ask for fewer"),
        (["--prior", "mine"], "borrowed"),
        (["--out", "nowhere/at/all"], "no such folder"),
        (["-m", "collective"], "20 rows"),
    ],
)
def test_refusals_are_one_line(
    measured: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(measured), *words]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and len(err.strip().splitlines()) == 1

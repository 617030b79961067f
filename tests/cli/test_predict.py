"""`ridgeplan predict`: the file's own rows with predictions behind them, or the reason why not."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from cli.commands.predict import COLUMNS
from cli.main import main
from hwmodels import catalog
from hwmodels.catalog import DATA
from hwmodels.dtypes import BF16
from simulator.kernel_time.predict import predict
from tests.validate.data import (
    example,
    kernel_row,
    made_calibration,
    timed_as_predicted,
    write_calibration,
    write_csv,
)
from validate.adapters import parts
from validate.measurement import COLLECTIVES, KERNELS, STEPS
from workloads.ops.matmul import Matmul

SHAPE = {"m": 4096, "n": 2048, "k": 1024}
GOOD = kernel_row(SHAPE, 30.0)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text), strict=True))


def test_rows_keep_their_bytes_and_gain_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = 'made/up,H100-SXM-80GB,gemm,bf16,"{""m"": 8, ""n"":8,  ""k"":8}", 07.50'
    content = f"{','.join(KERNELS)}\r\n{odd}\r\n\r\n{odd}"
    path = tmp_path / "kernels_gemm.csv"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    out = tmp_path / "out.csv"
    assert main(["predict", str(path), "--out", str(out)]) == 0
    said, err = capsys.readouterr()
    assert said.startswith(f"wrote {out}: 2 rows: 2 predicted, 0 without; MAPE ")
    assert err == ""
    lines = out.read_bytes().decode().split("\r\n")
    assert lines[0] == "\ufeff" + ",".join((*KERNELS, *COLUMNS))
    assert lines[1].startswith(f"{odd},") and lines[3].startswith(f"{odd},")
    assert lines[2] == "" and lines[4] == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernels_gemm.csv", "out.csv"]


def test_a_prediction_is_what_the_model_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_csv(tmp_path / "kernels_gemm.csv", [GOOD])
    given = write_calibration(tmp_path / "c.json", made_calibration("h100-sxm", half=0.2))
    assert main(["predict", str(path), "--calibration", str(given)]) == 0
    out, err = capsys.readouterr()
    (row,) = rows_of(out)
    p = predict(
        Matmul(m=4096, n=2048, k=1024, dtype=BF16),
        on=catalog.device("h100-sxm"),
        conditions=parts(example("gemm", source="made/up", params=SHAPE))[0].conditions,
        calibrations=[made_calibration("h100-sxm", half=0.2)],
    )
    times = [float(row[name]) * 1e-6 for name in COLUMNS[:3]]
    assert times == pytest.approx([p.seconds, *p.interval(80)], rel=1e-6)
    assert row["rung"] == "calibrated"
    assert "calibration of h100-sxm" in row["note"]
    assert err == ""


@pytest.mark.parametrize("untimed", ["empty", "absent"])
def test_rows_need_no_measured_time(
    tmp_path: Path, untimed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels, collectives = kernel_row(SHAPE, ""), ["a/b", "GB200", "1", "4", "all_reduce", "1024"]
    if untimed == "absent":
        write_csv(tmp_path / "kernels_x.csv", [kernels[:-1]], KERNELS[:-1])
        write_csv(tmp_path / "collectives.csv", [collectives], COLLECTIVES[:-1])
    else:
        write_csv(tmp_path / "kernels_x.csv", [kernels])
        write_csv(tmp_path / "collectives.csv", [[*collectives, ""]], COLLECTIVES)
    for name in ("kernels_x.csv", "collectives.csv"):
        assert main(["predict", str(tmp_path / name)]) == 0
        out, err = capsys.readouterr()
        (row,) = rows_of(out)
        assert float(row["predicted_us"]) > 0
        assert err == ""


BAD = [
    (kernel_row(SHAPE, "nan"), "refused: latency_us is not a positive finite number"),
    (kernel_row(SHAPE, "-1"), "refused: latency_us is not a positive finite number"),
    (kernel_row({"m": 1, "k": 2}, 1), "refused: params lacks size n"),
    (kernel_row(SHAPE | {"m": -1}, 1), "refused: params: m is negative or not finite"),
    (kernel_row(SHAPE, 1, dtype="bf17"), "refused: the dtype is unknown"),
    (kernel_row(SHAPE, 1, gpu="H999"), "refused: the GPU is in no catalogue"),
    (kernel_row(SHAPE, 1, gpu="T4"), "t4 has no bf16 rate"),
    (GOOD[:3], "refused: the row has too few fields"),
    ([*GOOD, "more", "and, more"], "refused: the row has too many fields"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_row_has_its_reason_and_its_neighbours_a_prediction(
    tmp_path: Path, bad: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_csv(tmp_path / "kernels_gemm.csv", [GOOD, bad, GOOD])
    assert main(["predict", str(path)]) == 0
    out, err = capsys.readouterr()
    first, row, last = rows_of(out)
    assert first["predicted_us"] == last["predicted_us"] != ""
    assert [row[name] for name in COLUMNS[:4]] == [""] * 4
    assert reason in row["note"]
    assert None not in row, "cells beyond the header"
    assert "3 rows: 2 predicted, 1 without" in err
    assert f"1 rows (first: line 3): {reason}" in err


def test_a_row_that_is_no_csv_does_not_take_the_file_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_csv(tmp_path / "kernels_gemm.csv", [GOOD])
    broken = 'made/up,H100-SXM-80GB,gemm,bf16,"{"m": 1, "n": 2}",3\n'
    unclosed = 'made/up,H100-SXM-80GB,gemm,bf16,"{,3\n'
    text = path.read_text(encoding="utf-8")
    path.write_text(text + broken + unclosed + text.splitlines()[1] + "\n", encoding="utf-8")
    assert main(["predict", str(path)]) == 0
    out, err = capsys.readouterr()
    rows = rows_of(out)
    assert [bool(r["predicted_us"]) for r in rows] == [True, False, False, True]
    assert rows[1]["source"] == broken.rstrip("\n")
    assert "2 rows (first: line 3): refused: the row is not CSV" in err


def test_json_is_one_document_with_the_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_csv(tmp_path / "kernels_gemm.csv", [GOOD, GOOD[:3], kernel_row(SHAPE, "")])
    assert main(["predict", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert next(iter(document)) == "version" and document["version"] == 1
    assert (document["num_rows"], document["num_predicted"]) == (3, 2)
    keys = {"line", *KERNELS, *COLUMNS}
    assert [set(row) for row in document["rows"]] == [keys] * 3
    first, bad, last = document["rows"]
    assert first["latency_us"] == "30.0" and last["latency_us"] == ""
    assert 0 < first["low_us"] < first["predicted_us"] < first["high_us"]
    assert [bad[name] for name in COLUMNS[:4]] == [None] * 4
    assert document["unsupported"] == [
        {"reason": "refused: the row has too few fields", "n": 1, "first_line": 3}
    ]
    assert document["mape"] == pytest.approx(abs(first["predicted_us"] / 30 - 1))


def test_a_row_the_calibration_was_fitted_on_says_so_and_is_no_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = example("gemm", source="made/up", gpu="H100-SXM-80GB", params=SHAPE)
    given = write_calibration(tmp_path / "c.json", made_calibration("h100-sxm", rows=[row]))
    path = write_csv(tmp_path / "kernels_gemm.csv", [GOOD])
    assert main(["predict", str(path), "--calibration", str(given), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"][0]["note"].endswith("the calibration was fitted on this row")
    assert document["mape"] is None


def test_a_guessed_op_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "kernels_odd.csv", [kernel_row(SHAPE, 3, op="fancy_product")])
    assert main(["predict", str(path)]) == 0
    assert "guessed" in rows_of(capsys.readouterr().out)[0]["note"]


def test_a_gpu_nobody_knows_can_be_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_csv(tmp_path / "kernels_gemm.csv", [kernel_row(SHAPE, 30.0, gpu="My GPU")])
    assert main(["predict", str(path)]) == 2
    err = capsys.readouterr().err
    assert "describe it in a TOML file" in err and "--device 'My GPU=FILE.toml'" in err
    spec = tmp_path / "my-gpu.toml"
    shutil.copy(DATA / "devices" / "l40s.toml", spec)
    times = []
    for target in (str(spec), "l40s"):
        assert main(["predict", str(path), "--device", f"My GPU={target}"]) == 0
        times.append(rows_of(capsys.readouterr().out)[0]["predicted_us"])
    assert times[0] == times[1]
    assert main(["validate", str(path), "--device", f"My GPU={spec}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(t["gpu"], t["n"]) for t in document["tables"]] == [("My GPU", 1)]


STEP = ["s", "B200-SXM", "8", '{"layers":32}', '{"tp":8}', "bf16", "tpot_ms", "2"]


@pytest.mark.parametrize(
    ("rows", "header", "expected"),
    [
        (
            [GOOD[:3], GOOD[:2]],
            KERNELS,
            "none of 2 rows can be predicted; 2 of them",
        ),
        ([STEP], STEPS, "a whole step is not one op"),
        ([["1"]], ("x",), "not a known header"),
        ([], KERNELS, "a header and no rows"),
    ],
)
def test_nothing_to_predict_is_exit_2_in_one_line(
    tmp_path: Path,
    rows: list[list[str]],
    header: tuple[str, ...],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_csv(tmp_path / "a.csv", rows, header)
    target = tmp_path / "out.csv"
    for arguments in ([], ["--json"], ["--out", str(target)]):
        assert main(["predict", str(path), *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("ridgeplan: error: ") and err.count("\n") == 1
        assert expected in err
    assert not target.exists()


def test_bad_usage_is_exit_2_in_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_csv(tmp_path / "a.csv", [GOOD])
    before = path.read_bytes()
    other = made_calibration("h100-sxm")
    stale = write_calibration(tmp_path / "stale.json", other, schema=1)
    foreign = write_calibration(tmp_path / "foreign.json", other, device="no-such-gpu")
    fine = write_calibration(tmp_path / "fine.json", other)
    cases = [
        ([str(tmp_path)], "is a folder"),
        ([str(tmp_path / "no.csv")], "cannot be read"),
        ([str(path), "--out", str(path)], "is the file that is read"),
        ([str(path), "--out", str(tmp_path / "no" / "x.csv")], "no folder"),
        ([str(path), "--device", "l40s"], "is not GPU=DEVICE"),
        ([str(path), "--device", "X=no-such"], "unknown device"),
        ([str(path), "--device", "X=./no.toml"], "no.toml"),
        ([str(path), "--device", "X=t4", "--device", "X=p4"], "given twice"),
        ([str(path), "--calibration", str(stale)], "schema"),
        ([str(path), "--calibration", str(foreign)], "'no-such-gpu', which is in no catalogue"),
        ([str(path), "--calibration", str(fine), "--calibration", str(fine)], "two files"),
        ([str(path), "--calibration", str(tmp_path / "no.json")], "cannot be read"),
        ([str(path), "--calibration", str(path)], "not valid JSON"),
    ]
    files = sorted(tmp_path.iterdir())
    for command in ("predict", "validate"):
        for arguments, expected in cases:
            if command == "validate" and ("--out" in arguments or len(arguments) == 1):
                continue
            assert main([command, *arguments]) == 2, arguments
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith("ridgeplan: error: ") and err.count("\n") == 1, err
            assert expected in err
    assert sorted(tmp_path.iterdir()) == files
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_csv(tmp_path / "a.csv", [GOOD]), tmp_path / "out.csv"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr("os.replace", full)
    assert main(["predict", str(path), "--out", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "out.csv"]


def test_the_given_calibration_wins_over_the_shipped_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = made_calibration("h100-sxm", scale=1.0, half=0.5)
    row = timed_as_predicted(example("gemm", source="made/up", params=SHAPE), 1.0, [given])
    path = write_csv(
        tmp_path / "kernels_gemm.csv", [kernel_row(SHAPE, float(row.seconds or 0) * 1e6)]
    )
    file = write_calibration(tmp_path / "c.json", given)
    assert main(["validate", str(path), "--calibration", str(file), "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["mape"] == pytest.approx(0, abs=1e-9)
    assert (table["calibration"], table["scope"]) == ("h100-sxm", "own")

"""`ridgeplan validate`: tables, JSON, Markdown, and one line for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from tests.validate.data import kernel_row, write_csv
from validate.measurement import COLLECTIVES, STEPS

SHAPE = {"m": 4096, "n": 4096, "k": 4096}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [kernel_row(SHAPE, 300.0), kernel_row(SHAPE, 250.0), kernel_row({"m": 1}, 1.0)]
    write_csv(tmp_path / "kernels_gemm.csv", rows)
    write_csv(
        tmp_path / "collectives.csv",
        [["s", "GB200", "1", "4", "all_reduce", "1024", "9.5"]],
        COLLECTIVES,
    )
    return tmp_path


def test_tables_fit_a_hundred_columns_and_count_every_row(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "H100-SXM-80GB" in out
    assert "no op for all_reduce yet" in out
    assert "4 rows: 2 predicted, 2 without" in " ".join(out.split())
    assert "refused 1 rows" in err
    assert "kernels_gemm.csv, line 4: params lacks size n" in err


def test_json_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["version"], document["rung"]) == (1, "bound")
    counted = [(t["family"], t["n"], t["unsupported"]) for t in document["tables"]]
    assert counted == [("collectives", 0, 1), ("gemm", 2, 1)]
    flops, peak = 2 * 4096**3, 989.4e12
    bound = flops / peak * 1e6
    expected = ((300 - bound) / 300 + (250 - bound) / 250) / 2
    assert document["tables"][1]["mape"] == pytest.approx(expected, rel=1e-9)
    reasons = {u["reason"]: u["n"] for u in document["unsupported"]}
    assert reasons == {"no op for all_reduce yet": 1, "refused: params lacks size n": 1}


def test_one_family_or_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([str(folder), "--family", "gemm"], [str(folder / "kernels_gemm.csv")]):
        assert main(["validate", *arguments, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert {t["family"] for t in document["tables"]} == {"gemm"}


def test_markdown_is_written_and_dated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder / "accuracy.md"
    assert main(["validate", str(folder), "--markdown", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    assert text.startswith("# Accuracy\n")
    assert "| gemm | H100-SXM-80GB | 2 | 1 |" in text
    assert str(folder) not in text
    assert capsys.readouterr().out


@pytest.fixture
def training(tmp_path: Path) -> Path:
    model = {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 12, "ffn": 3072, "gated": 0,
             "vocab": 50368, "seq": 2048}  # fmt: skip
    layout = {"dp": 8, "tp": 1, "pp": 1, "cp": 1, "microbatch": 4, "globalbatch": 64, "zero": 3,
              "recompute": "none"}  # fmt: skip
    said = ["made/up", "H100-SXM-80GB", "8", json.dumps(model), json.dumps(layout), "bf16"]
    rows = [[*said, "step_time_s", "1.5"], [*said, "mfu_pct", "40"]]
    write_csv(tmp_path / "steps_training.csv", rows, STEPS)
    return tmp_path


def test_training_steps_are_compared_as_a_whole(
    training: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(training)]) == 0
    out = capsys.readouterr().out
    assert "training steps: measured / bound" in out
    assert max(len(line) for line in out.splitlines()) <= 100
    assert main(["validate", str(training), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (table,) = document["training_steps"]["tables"]
    assert (table["source"], table["n"], table["n_unseen"]) == ("made", 1, 1)
    assert table["median"] > 1
    assert document["training_steps"]["unsupported"] == [
        {"reason": "the metric is not the time of a whole step", "n": 1}
    ]
    assert sum(t["n"] + t["unsupported"] for t in document["tables"]) == 2


def test_the_record_has_a_section_on_training_steps_where_there_are_any(
    training: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = folder / "accuracy.md"
    assert main(["validate", str(training), "--markdown", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    assert "\n## Training steps\n" in text
    assert "| made | H100-SXM-80GB | 1 | " in text
    assert main(["validate", str(folder), "--family", "gemm", "--markdown", str(target)]) == 0
    assert "Training steps" not in target.read_text(encoding="utf-8")
    assert capsys.readouterr().out


def test_an_unreadable_file_beside_a_good_one_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "kernels_odd.csv").write_text("a,b\n1,2\n")
    assert main(["validate", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tables"]
    assert "left out" in err
    assert "kernels_odd.csv" in err


@pytest.mark.parametrize("case", ["nowhere", "empty", "odd", "binary", "family", "folder"])
def test_nothing_readable_is_exit_2_in_one_line(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path)]
    if case == "nowhere":
        arguments = [str(tmp_path / "nowhere")]
    elif case == "odd":
        for name in ("a.csv", "b.csv"):
            (tmp_path / name).write_text("x\n")
    elif case == "binary":
        (tmp_path / "kernels_gemm.csv").write_bytes(bytes(range(256)))
    elif case == "family":
        write_csv(tmp_path / "kernels_gemm.csv", [kernel_row(SHAPE, 300.0)])
        arguments += ["--family", "gem"]
    elif case == "folder":
        write_csv(tmp_path / "kernels_gemm.csv", [kernel_row(SHAPE, 300.0)])
        arguments += ["--markdown", str(tmp_path / "no" / "a.md")]
    assert main(["validate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ridgeplan: error: ")
    assert err.count("\n") == 1

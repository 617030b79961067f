"""`ridgeplan validate`: tables, JSON, Markdown, and one line for what cannot be read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli.main import main
from tests.validate.data import kernel_row, made_calibration, write_calibration, write_csv
from validate.measurement import COLLECTIVES, STEPS

SHAPE = {"m": 4096, "n": 4096, "k": 4096}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [kernel_row(SHAPE, 300.0), kernel_row(SHAPE, 250.0), kernel_row({"m": 1}, 1.0)]
    write_csv(tmp_path / "kernels_gemm.csv", rows)
    write_csv(
        tmp_path / "collectives.csv",
        [["s", "GB200", "1", "4", "all_reduce", "-1", "9.5"]],
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
    assert "refused: bytes is not a positive finite number" in " ".join(out.split())
    assert "4 rows: 2 predicted, 2 without" in " ".join(out.split())
    assert "refused 2 rows" in err
    assert "collectives.csv, line 2: bytes is not a positive finite number" in err


def test_a_table_of_everything_stays_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        kernel_row(SHAPE, 3e-3, gpu="RTXPRO6000-SE", dtype=dtype, op=op)
        for dtype in ("bf16", "fp8_rowwise", "int8_smoothquant")
        for op in ("gemm", "gdn_generation_of_a_very_long_name_that_nobody_heard_of")
    ]
    write_csv(tmp_path / "kernels_a_family_of_a_long_name_too.csv", rows)
    assert main(["validate", str(tmp_path), "--ablation"]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 100
    heads = next(line for line in out.splitlines() if "MAPE" in line and "p90" in line)
    names = ["GPU", "dtype", "n", "MAPE", "median", "p90", "bias", "in", "80", "in", "90",
             "roof", "from"]  # fmt: skip
    assert heads.split() == names
    assert "…" not in out
    assert ">9999" in out
    title = "gdn_generation_of_a_very_long_name_that_nobody_heard_of: errors in %"
    assert title in " ".join(out.split())
    assert "rows were recognised by the sizes they state alone" in out


def test_json_is_one_document(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = write_calibration(tmp_path / "c.json", made_calibration("h100-sxm"))
    arguments = ["validate", str(folder), "--calibration", str(given), "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    whole = {"training_steps", "serving_steps", "peak_memory", "collective_cells",
             "plan_ranking", "families"}  # fmt: skip
    assert set(document) == {"version", "rung", "tables", "unsupported"} | whole
    assert (document["version"], document["rung"]) == (1, "best")
    counted = [(t["family"], t["n"], t["unsupported"]) for t in document["tables"]]
    assert counted == [("collectives", 0, 1), ("gemm", 2, 1)]
    flops, peak = 2 * 4096**3, 989.4e12
    bound = flops / peak * 1e6
    expected = ((300 - bound) / 300 + (250 - bound) / 250) / 2
    assert document["tables"][1]["roofline_mape"] == pytest.approx(expected, rel=1e-9)
    assert document["tables"][1]["calibration"] == "h100-sxm"
    reasons = {u["reason"]: u["n"] for u in document["unsupported"]}
    assert reasons == {
        "refused: bytes is not a positive finite number": 1,
        "refused: params lacks size n": 1,
    }
    assert main([*arguments, "--ablation"]) == 0
    (steps,) = json.loads(capsys.readouterr().out)["ablation"]
    assert set(steps) == {"family", "gpu", "n", "bound", "nominal", "borrowed", "best"}
    assert steps["best"] == document["tables"][1]["mape"]


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
    assert "| gemm | H100-SXM-80GB | bf16 | 2 | 1 |" in text
    assert str(folder) not in text
    assert "What calibration buys" not in text
    assert capsys.readouterr().out.endswith(f"wrote {target}\n")
    assert main(["validate", str(folder), "--ablation", "--markdown", str(target)]) == 0
    assert "What calibration buys" in target.read_text(encoding="utf-8")


def test_the_page_is_self_contained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder / "accuracy.html"
    assert main(["validate", str(folder), "--html", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert text.count("Plotly.newPlot(") == 2
    assert "4 rows of" in text and "params lacks size n" in text
    assert f"wrote {target}" in capsys.readouterr().out


def test_a_gpu_nobody_knows_gets_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [kernel_row(SHAPE, 300.0), kernel_row(SHAPE, 300.0, gpu="My GPU")]
    write_csv(tmp_path / "kernels_gemm.csv", rows)
    assert main(["validate", str(tmp_path)]) == 0
    assert "--device 'My GPU=FILE.toml'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--markdown", "--html"])
def test_a_failed_write_leaves_the_old_file(
    folder: Path, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = folder / "accuracy.html"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("os.replace", full)
    before = sorted(folder.iterdir())
    assert main(["validate", str(folder), option, str(target)]) == 2
    assert capsys.readouterr().out == ""
    assert target.read_text() == "old"
    assert sorted(folder.iterdir()) == before


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


@pytest.mark.parametrize("case", ["nowhere", "empty", "odd", "binary", "family", "folder", "page"])
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
    elif case == "page":
        write_csv(tmp_path / "kernels_gemm.csv", [kernel_row(SHAPE, 300.0)])
        arguments += ["--html", str(tmp_path / "a.png")]
    assert main(["validate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ridgeplan: error: ")
    assert err.count("\n") == 1

"""`ridgeplan plan memory`: a model, a snapshot, tensors and a graph, and every bad input."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from simulator.planners import cp_sat
from tests.simulator.test_recorded_memory import HELD, STEP, snapshot

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = (str(EXAMPLES / "llama3-8b.json"), "-c", "hgx-h100", "--seq", "512k", "--pin", "tp=8",
         "--host-memory", "2TB")  # fmt: skip
GRAPH = (str(EXAMPLES / "memory" / "branches.json"), "--budget", "6GB")
TENSORS = (str(EXAMPLES / "memory" / "tensors.csv"),)


def document(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main(["plan", "memory", *args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    assert next(iter(found)) == "version"
    return found


def words(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["plan", "memory", *args]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(out.split())


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "step.pickle"
    path.write_bytes(pickle.dumps(snapshot(STEP, segments=HELD)))
    return path


# ---- answers -----------------------------------------------------------------------------------


def test_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *MODEL)
    swap, storage = found["swap"], found["storage"]
    assert found["source"] == "model" and found["plan"]["tp"] == 8 and found["plan"]["dp"] == 1
    assert (swap["status"], swap["gap_frac"], swap["binding"]) == ("optimal", 0.0, "host memory")
    assert swap["swapped_frac"] <= swap["alpha"] < swap["swapped_frac"] + 1 / swap["num_tokens"]
    assert swap["host_bytes"] <= swap["host_budget_bytes"] == 2e12 / 8
    assert swap["copy_s"] <= swap["layer_forward_s"]
    assert storage["status"] == "optimal" and storage["above_live_frac"] == 0
    assert storage["peak_bytes"] == max(t["address"] + t["bytes"] for t in storage["tensors"])
    assert storage["peak_bytes"] <= storage["caching_allocator_bytes"]
    assert storage["two_levels"]["num_passes"] == 64
    assert found["storage_all_kept"]["peak_bytes"] > 4 * storage["peak_bytes"]


def test_a_slower_link_swaps_less(capsys: pytest.CaptureFixture[str]) -> None:
    base = (*MODEL, "--seq", "16k")
    fast, slow = (
        document(capsys, *base, "--host-bandwidth", rate)["swap"] for rate in ("60GB/s", "45GB/s")
    )
    assert fast["binding"] == slow["binding"] == "copy hidden behind the layer"
    assert 0 < slow["alpha"] < fast["alpha"] < 1
    assert slow["recompute_s"] > fast["recompute_s"]


def test_a_recording(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(recording))
    assert found["source"] == "recording" and found["recorded_reserved_bytes"] == 18 * 2**20
    assert found["storage"]["peak_bytes"] == found["storage"]["live_bytes"] == 11 * 2**20
    assert "18.9 MB" in words(capsys, str(recording))


def test_a_graph(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *GRAPH)["schedule"]
    assert found["status"] == "optimal" and found["gap_frac"] == 0.0
    assert found["recomputed"] == {"left": 1}
    assert found["seconds"] == pytest.approx(found["once_s"] + 0.010)
    assert found["peak_bytes"] <= found["budget_bytes"] == 6e9
    assert "Again left" in words(capsys, *GRAPH)


def test_tensors_with_and_without_proof(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert document(capsys, *TENSORS)["storage"]["proof"] is None
    hard = tmp_path / "hard.csv"
    rows = [(1, 2, 5), (2, 0, 2), (1, 3, 5), (3, 2, 6), (3, 4, 6), (3, 0, 2), (2, 5, 6),
            (1, 2, 4), (3, 1, 3)]  # fmt: skip
    hard.write_text("size,start,end\n" + "".join(f"{s},{a},{b}\n" for s, a, b in rows))
    open_ = document(capsys, str(hard), "--time-limit", "100ms")["storage"]
    assert (open_["status"], open_["peak_bytes"], open_["lower_bytes"]) == ("feasible", 9, 8)
    assert open_["gap_frac"] == pytest.approx(1 / 9)
    proven = document(capsys, str(hard), "--prove", "highs", "--time-limit", "20s")["storage"]
    assert (proven["status"], proven["lower_bytes"]) == ("optimal", 9)
    assert proven["proof"]["engine"] == "highs" and proven["proof"]["status"] == "optimal"
    near = document(capsys, str(hard), "--gap", "20%")["storage"]
    assert near["peak_bytes"] == 9 and near["solve_s"] < 1


def test_explanations_have_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert "max alpha" in words(capsys, *MODEL, "--explain")
    shown = words(capsys, *TENSORS, "--explain")
    assert "weights[0] below the peak: A[0] - peak <= -4e+08" in shown
    assert "A[0] .. + 4e+08 from 0 to 14" in shown
    assert "reads[1,0,1]" in document(capsys, *GRAPH, "--explain")["explanation"]


def test_charts_and_programs_are_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recording: Path
) -> None:
    page, program = tmp_path / "a.html", tmp_path / "a.lp"
    assert "wrote" in words(capsys, *MODEL, "--html", str(page), "--lp", str(program))
    text = page.read_text(encoding="utf-8")
    for part in ("swap buffer", "address, GiB", "request, in order", "alive at once"):
        assert part in text, part
    assert "Maximize" in program.read_text()
    words(capsys, str(recording), "--html", str(page))
    assert "model.py:7" in page.read_text(encoding="utf-8")
    words(capsys, *GRAPH, "--lp", str(tmp_path / "g.mps"))
    assert (tmp_path / "g.mps").read_text().startswith("*SENSE")


@pytest.mark.parametrize("job", [MODEL, GRAPH, TENSORS])
@pytest.mark.parametrize("columns", [60, 100])
def test_nothing_is_wider_than_the_page(
    job: tuple[str, ...],
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["plan", "memory", *job]) == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= columns


def test_plan_of_a_model_is_still_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: ridgeplan plan [OPTIONS] ")
    assert main(["plan", "memory", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: ridgeplan plan memory [OPTIONS] ")


# ---- bad input ---------------------------------------------------------------------------------


def test_a_host_of_the_catalogue_needs_no_size(capsys: pytest.CaptureFixture[str]) -> None:
    own = [*MODEL[:-2]]
    own[own.index("-c") + 1] = "dgx-h100"
    found = document(capsys, *own)["swap"]
    assert found["host_budget_bytes"] == 2e12 / 8
    smaller = document(capsys, *own, "--host-memory", "1TB")["swap"]
    assert smaller["host_budget_bytes"] == 1e12 / 8
    named = document(capsys, *own, "--host-memory", "node")["swap"]
    assert named | {"solve_s": 0} == found | {"solve_s": 0}


BAD: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no source": ((), 2, "plan memory --help"),
    "no file": (("none.csv",), 2, "no file none.csv"),
    "no cluster": ((MODEL[0],), 2, "--cluster and --seq"),
    "no host memory": (MODEL[:-2], 2, "give --host-memory"),
    "host too small": ((*MODEL[:-1], "1GB"), 3, "host memory"),
    "layer too short": ((*MODEL, "--host-bandwidth", "1GB/s"), 3, "copy hidden"),
    "pipeline": ((*MODEL[:-4], "--pin", "pp=8", *MODEL[-2:]), 3, "stage 0 of 8: host memory"),
    "pins": ((*MODEL, "--pin", "cp=3"), 2, "do not divide 8 ranks"),
    "no budget": (GRAPH[:1], 2, "needs --budget"),
    "small budget": ((GRAPH[0], "--budget", "5GB"), 3, "least that works is 5.122 GiB"),
    "graph chart": ((*GRAPH, "--html", "x.html"), 2, "no chart"),
    "engine": ((*TENSORS, "--prove", "gurobi"), 2, "give highs, cbc, cp-sat"),
    "time": ((*TENSORS, "--time-limit", "0s"), 2, "above 0 s"),
    "gap": ((*TENSORS, "--gap", "2"), 2, "outside 0..1"),
    "format": ((*TENSORS, "--lp", "x.txt"), 2, ".lp or .mps"),
    "nowhere": ((*TENSORS, "--html", "no/such/x.html"), 2, "no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_questions_are_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, code, told = BAD[case]
    assert main(["plan", "memory", *args]) == code
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.count("\n") == 1


FILES: dict[str, tuple[str, str, int, str]] = {
    "empty": ("t.csv", "", 2, "columns are name, size"),
    "columns": ("t.csv", "size,begin,end\n1,0,1\n", 2, "'start'"),
    "negative": ("t.csv", "size,start,end\n-4,0,1\n", 2, "at least a byte"),
    "backwards": ("t.csv", "size,start,end\n4,3,1\n", 2, "end after the start"),
    "word": ("t.csv", "size,start,end\n4,zero,1\n", 2, "start of row 1 = 'zero'"),
    "ragged": ("t.csv", "size,start,end\n4,0\n", 2, "end of row 1"),
    "nan": ("t.csv", "size,start,end\n4,nan,1\n", 2, "not a whole number"),
    "binary": ("t.csv", "\xff\x00", 2, "t.csv"),
    "json": ("g.json", "{", 2, "cannot read"),
    "nodes": ("g.json", '{"nodes": 3}', 2, "list of objects"),
    "node": ("g.json", '{"nodes": [{"seconds": 1}]}', 2, "needs a name"),
    "number": ("g.json", '{"nodes": [{"name": "a", "seconds": "x", "bytes": 1}]}', 2, "seconds"),
    "order": (
        "g.json", '{"nodes": [{"name": "a", "seconds": 1, "bytes": 1, "reads": ["b"]}]}', 2,
        "no earlier node makes",
    ),
    "other pickle": ("s.pickle", "junk", 2, "no allocator snapshot"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, code, told = FILES[case]
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    assert main(["plan", "memory", str(path), "--budget", "5GB"]) == code
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.count("\n") == 1


def test_cp_sat_that_is_absent_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp_sat, "available", lambda: False)
    hard = tmp_path / "hard.csv"
    rows = ["1,2,5", "2,0,2", "1,3,5", "3,2,6", "3,4,6", "3,0,2", "2,5,6", "1,2,4", "3,1,3"]
    hard.write_text("\n".join(["size,start,end", *rows]))
    args = ["plan", "memory", str(hard), "--prove", "cp-sat", "--time-limit", "100ms"]
    assert main(args) == 2
    assert "pip install 'ridgeplan[cp-sat]'" in capsys.readouterr().err


def test_pipeline_stages(capsys: pytest.CaptureFixture[str]) -> None:
    asked = (*MODEL[:-2], "--seq", "128k", "--pin", "pp=2", "--host-memory", "2TB")
    asked = tuple("tp=4" if word == "tp=8" else word for word in asked)
    found = document(capsys, *asked)
    assert [(s["num_layers"], s["in_flight"]) for s in found["stages"]] == [(16, 2.0), (16, 1.0)]
    assert found["stage"] == 0 and found["swap"]["alpha"] == found["stages"][0]["alpha"]
    assert all(s["host_bytes"] <= s["host_budget_bytes"] for s in found["stages"])
    kept, swapped = found["storage_all_kept"]["peak_bytes"], found["storage"]["peak_bytes"]
    assert kept > 8 * swapped
    assert "in flight" in words(capsys, *asked)
    assert main(["plan", "memory", *asked, "--host-memory", "100GB"]) == 3
    assert "stage 0 of 2: host memory" in capsys.readouterr().err

"""`ridgeplan plan sequences`: lengths from a file or a corpus, the proof, and every bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ASKED = (str(EXAMPLES / "llama3-8b.json"), "-c", "hgx-h100", "-n", "2")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["plan", "sequences", *ASKED, *args])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    found, out, err = run(capsys, *args)
    assert found == code and out == "" and err.count("\n") == 1
    return err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.txt"
    path.write_text("900,120\n60000  # one long\n\n20000,3\n4000\n", encoding="utf-8")
    return path


def test_a_file_gives_groups_an_assignment_and_a_proof(
    capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    code, out, err = run(capsys, "--lengths", str(file), "--json")
    assert code == 0 and err == ""
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    assert next(iter(found)) == "version"
    held = [900] * 120 + [60000] + [20000] * 3 + [4000]
    groups = [g for batch in found["micro_batches"] for g in batch["groups"]]
    placed = sorted(k for g in groups for k in g["sequences"])
    assert placed == list(range(len(held)))
    for group in groups:
        own = [held[k] for k in group["sequences"]]
        assert sum(own) == group["num_tokens"] <= group["degree"] * found["rank_tokens"]
        assert max(own) == group["longest"]
    for batch in found["micro_batches"]:
        assert batch["seconds"] == pytest.approx(max(g["seconds"] for g in batch["groups"]))
    assert found["lower_s"] <= found["seconds"] <= found["best_homogeneous_s"]
    assert found["gap_frac"] == pytest.approx(found["seconds"] / found["lower_s"] - 1)


def test_words_explanation_and_chart(
    capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    page = tmp_path / "groups.html"
    code, out, err = run(capsys, "--lengths", str(file), "--explain", "--html", str(page))
    assert code == 0 and err == ""
    words = " ".join(out.split())
    assert "no grouping of these micro-batches takes less than" in words
    assert "ranks needed within" in words and "optimal: " in words
    assert page.stat().st_size > 1000


def test_a_corpus_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--seq", "64k", "-b", "64", "--corpus", "github", "--json")
    found = json.loads(out)
    assert code == 0 and found["num_sequences"] == 64 and found["corpus"] == "github"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no sequences"),
        ("\n# nothing\n", "has no sequences"),
        ("5\n-3\n", "line 2 of x.txt = '-3'"),
        ("5\n0\n", "line 2 of x.txt = '0'"),
        ("5\n\nabc\n", "line 3 of x.txt = 'abc'"),
        ("5\n7.5\n", "line 2 of x.txt = '7.5'"),
        ("5,-1\n", "the count"),
        ("5,2,3\n", "more than 'length,count'"),
        ("5,999999999\n", "more than 100,000 sequences"),
    ],
)
def test_bad_files_name_the_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "x.txt"
    path.write_text(text, encoding="utf-8")
    assert words in refused(capsys, "--lengths", str(path))


def test_a_sequence_that_fits_nothing_is_named_with_what_would_fit_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("5\n9000000\n", encoding="utf-8")
    err = refused(capsys, "--lengths", str(path), code=3)
    assert "line 2: a sequence of 9000000 tokens" in err and "--nodes" in err


def test_contradictions_are_refused(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    given = ("--lengths", str(file))
    assert "--corpus is for drawn lengths" in refused(capsys, *given, "--corpus", "github")
    assert "line 2: 60000 tokens" in refused(capsys, *given, "--seq", "32k")
    assert "need --seq" in refused(capsys)
    assert "--time-limit" in refused(capsys, *given, "--time-limit", "0s")
    assert "cannot read" in refused(capsys, "--lengths", str(file.parent / "none.txt"))


def test_ranks_that_are_no_power_of_two(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    model, *_ = ASKED
    given = (model, "-c", "hgx-h100", "-n", "3", "--lengths", str(file), "--json")
    assert main(["plan", "sequences", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_accelerators"] == 24 and found["lower_s"] <= found["seconds"]


# ---- the other methods ---------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("300,20\n50,40\n3000\n1000,4\n17,30\n", encoding="utf-8")
    return path


def test_all_cuts_have_a_bound(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    _, out, _ = run(capsys, "--lengths", str(file), "--json", "--explain")
    found = json.loads(out)
    assert found["method"] == "groups" and "ranks needed within" in found["explanation"]
    assert found["cut_lower_s"] is None or found["cut_lower_s"] <= found["seconds"]


def test_hybrid(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    page = tmp_path / "rings.html"
    given = ("--lengths", str(file), "--method", "hybrid", "--time-limit", "1s",
             "--host-memory", "2TB")  # fmt: skip
    code, out, err = run(capsys, *given, "--json", "--explain", "--html", str(page))
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and err == "" and page.stat().st_size > 1000
    assert found["method"] == "hybrid" and "C" in found["explanation"]
    assert sorted(k for unit in found["units"] for k in unit["sequences"]) == list(range(125))
    assert all(len(unit["ranks"]) == unit["degree"] for unit in found["units"])
    assert found["lower_s"] <= found["seconds"] <= found["balanced_s"]
    words = " ".join(run(capsys, *given)[1].split())
    assert "no choice of ranks takes less than" in words and "rings and order searched" in words


def test_prepack(capsys: pytest.CaptureFixture[str], prompts: Path, tmp_path: Path) -> None:
    page = tmp_path / "rows.html"
    given = ("--lengths", str(prompts), "--method", "prepack")
    code, out, err = run(capsys, *given, "--json", "--explain", "--html", str(page))
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and err == "" and page.stat().st_size > 1000
    assert (found["status"], found["gap_frac"], found["prompts_per_pass"]) == ("optimal", 0.0, 64)
    assert "rows of pattern" in found["explanation"]
    rows = [row for one in found["passes"] for row in one["rows"]]
    assert len(rows) == found["num_rows"] == found["lower_rows"]
    assert sorted(k for row in rows for k in row) == list(range(95))
    padded, ordered, packed, apart = (way["seconds"] for way in found["ways"])
    assert apart < packed < ordered < padded
    words = " ".join(run(capsys, *given)[1].split())
    assert "7 rows, 92.4 % fewer tokens than padded; no packing has fewer" in words


def test_prepack_in_passes_and_rows_of_ones_own(
    capsys: pytest.CaptureFixture[str], prompts: Path
) -> None:
    given = ("--lengths", str(prompts), "--method", "prepack", "--prompts", "20", "--json")
    found = json.loads(run(capsys, *given, "--row", "4k")[1])
    assert [one["num_prompts"] for one in found["passes"]] == [20, 20, 20, 20, 15]
    assert found["row_tokens"] == 4096
    assert max(one["len_row"] for one in found["passes"]) <= 4096


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--method", "grups"), 2, "did you mean groups"),
        (("--prompts", "4"), 2, "--prompts is for --method prepack"),
        (("--method", "prepack", "--host-memory", "2TB"), 2, "is for --method hybrid"),
        (("--method", "prepack", "--prompts", "0"), 2, "--prompts = '0'"),
        (("--method", "hybrid", "--host-memory", "0B"), 2, "is no size"),
        (("--method", "hybrid"), 2, "no figure for the memory of a host of hgx-h100"),
        (("--method", "prepack", "--seq", "2k"), 2, "line 3: 3000 tokens"),
        (("--method", "prepack", "--row", "100"), 3, "line 3: a prompt of 3000 tokens fits no row"),
    ],
)
def test_methods_and_their_options(
    capsys: pytest.CaptureFixture[str], prompts: Path, args: tuple[str, ...], code: int, words: str
) -> None:
    assert words in refused(capsys, "--lengths", str(prompts), *args, code=code)


def test_what_no_device_and_no_ring_holds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("9000,300\n", encoding="utf-8")
    given = ("--lengths", str(path), "--method", "prepack", "--prompts", "300")
    assert "--prompts 30 would fit" in refused(capsys, *given, code=3)
    path.write_text("5\n9000000\n", encoding="utf-8")
    given = ("--lengths", str(path), "--method", "hybrid", "--host-memory", "2TB")
    err = refused(capsys, *given, code=3)
    assert "line 2: a sequence of 9000000 tokens" in err


def test_hosts_without_a_link(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    from hwmodels import catalog

    names = [c.id for c in catalog.clusters() if not c.side_levels and c.num_accelerators > 1]
    if not names:
        pytest.skip("every cluster of the catalogue has a link to its host")
    model, *_ = ASKED
    given = (model, "-c", names[0], "--lengths", str(file), "--method", "hybrid")
    assert main(["plan", "sequences", *given, "--host-memory", "2TB"]) == 2
    assert "no known link to a host" in capsys.readouterr().err

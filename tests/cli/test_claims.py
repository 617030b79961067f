"""`ridgeplan claims`: verdicts as table, JSON and Markdown; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main

SYSTEM = {
    "id": "flash_attention_2",
    "family": "attention",
    "claims": [
        {"quantity": "bwd attention fraction of peak", "value": 0.6, "unit": "fraction",
         "setting": {"gpu": "A100"}, "kind": "mfu"},
        {"quantity": "bwd attention fraction of peak", "value": 0.1, "unit": "fraction",
         "setting": {"gpu": "A100"}, "kind": "mfu"},
        {"quantity": "taste", "value": 1, "setting": {"gpu": "A100"}},
    ],
}  # fmt: skip
OTHER = {"id": "nobody", "family": "unheard", "claims": [{"quantity": "speed", "value": 2}]}


@pytest.fixture
def file(tmp_path: Path) -> str:
    place = tmp_path / "claims.json"
    place.write_text(json.dumps([SYSTEM, OTHER]))
    return str(place)


def test_the_document_is_the_contract(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"]
    assert [c["status"] for c in found["claims"]] == [
        "reproduced", "off", "not modelled", "not modelled",
    ]  # fmt: skip
    first = found["claims"][0]
    assert first["ratio"] == pytest.approx(first["predicted"] / first["published"])
    assert set(first) >= {"id", "quantity", "unit", "setting", "published", "predicted", "ratio",
                          "status", "reason"}  # fmt: skip
    assert found["summary"]["num_claims"] == 4 and found["summary"]["reproduced"] == 1
    assert found["summary"]["every_system_alike"]["num_systems"] == 2


def test_tables_tell_system_by_system_and_claim_by_claim(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", file]) == 0
    assert "nobody" in capsys.readouterr().out
    assert main(["claims", file, "-s", "flash_attention_2"]) == 0
    out = capsys.readouterr().out
    assert "taste" in out and "no rule" in out and "nobody" not in out


def test_records_are_written_whole(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, counts = tmp_path / "claims.md", tmp_path / "counts.json"
    assert main(["claims", file, "--markdown", str(page), "--scores", str(counts)]) == 0
    text = page.read_text()
    assert "| flash_attention_2 | 3 |" in text and "no evaluator for nobody yet" in text
    assert json.loads(counts.read_text())["flash_attention_2"]["off"] == 1
    assert str(page) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["-s", "flash_atention_2"], "did you mean flash_attention_2"),
        (["--family", "nothing"], "nothing"),
        (["--markdown", "/no/such/folder/x.md"], "no folder"),
    ],
)
def test_wrong_names_are_one_line(
    file: str, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", file, *more]) == 2
    out, err = capsys.readouterr()
    assert says in err and not out and err.count("\n") == 1


def test_a_file_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err

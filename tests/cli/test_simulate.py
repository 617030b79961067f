"""`ridgeplan simulate`: the step in words, as JSON, as a trace; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main

ASKED = ["simulate", "examples/llama3-8b.json", "-c", "hgx-h100", "--seq", "4k", "-b", "32"]


def test_a_step_is_told_with_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--pin", "tp=2", "--pin", "pp=2", "--pin", "v=1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in ("Train llama3-8b", "schedule 1f1b", "Critical path", "published steps"):
        assert words in told


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--pin", "tp=2", "--pin", "pp=2", "--pin", "v=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] and found["schedule"] == "interleaved"
    assert sum(found["critical_s"].values()) == pytest.approx(found["seconds"])
    assert found["plan"]["tp"] == 2 and found["tokens_per_s"] > 0


def test_a_trace_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    assert main([*ASKED, "--pin", "pp=2", "--trace", str(file)]) == 0
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    assert {"X", "M", "s", "f", "C"} == {e["ph"] for e in events}
    assert f"wrote {file}" in capsys.readouterr().out


def test_the_bound_is_faster_than_any_framework(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {}
    for name in ("bound", "megatron", "torchtitan"):
        assert main([*ASKED, "--pin", "tp=1", "--stack", name, "--json"]) == 0
        seconds[name] = json.loads(capsys.readouterr().out)["seconds"]
    assert seconds["bound"] < seconds["megatron"] < seconds["torchtitan"]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--stack", "megatrom"], 2, "unknown stack 'megatrom'; did you mean megatron"),
        (["--schedule", "2f2b", "--pin", "pp=2"], 2, "unknown schedule '2f2b'"),
        (["--schedule", "dualpipe", "--pin", "pp=1"], 2, "even number of stages"),
        (["--pin", "tp=0"], 2, "not a whole number from 1 up"),
        (["--trace", "no/such/folder/t.json"], 2, "no/such/folder"),
    ],
)
def test_what_cannot_be_is_one_line(
    more: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ASKED, *more]) == code
    out, err = capsys.readouterr()
    assert said in err and not out and err.count("\n") == 1

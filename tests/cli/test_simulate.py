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


def test_the_peak_of_memory_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--pin", "tp=2", "--pin", "pp=2", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    held = sum(a["bytes"] for a in memory["alive_at_peak"])
    assert held == pytest.approx(memory["peak_bytes"]) and held < memory["capacity_bytes"]
    assert {"weights", "optimizer", "activations"} <= {a["kind"] for a in memory["alive_at_peak"]}


def test_an_interval_of_left_out_tables_surrounds_the_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {}
    for name in ("megatron", "bound"):
        assert main([*ASKED, "--pin", "tp=2", "--stack", name, "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    told = found["megatron"]
    assert told["seconds_low_80"] < told["seconds"] < told["seconds_high_80"]
    assert found["bound"]["seconds_low_80"] is None


def test_a_step_waits_for_its_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--pin", "tp=2", "--data-loading", "90s", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] == 90 and found["critical_s"]["load"] == 90


def test_the_step_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "step.html"
    assert main([*ASKED, "--pin", "pp=2", "--pin", "v=2", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    for words in ("weights gathered", "backward", "memory of stage 1", "optimizer"):
        assert words in text
    assert f"wrote {page}" in capsys.readouterr().out


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
        (["--data-loading", "fast"], 2, "--data-loading = 'fast'"),
        (["--data-loading", "-3s"], 2, "loaded in -3 s; give a number of seconds from 0"),
        (["--out", "step.gif"], 2, "no known format"),
        (["--trace", "no/such/folder/t.json"], 2, "no/such/folder"),
    ],
)
def test_what_cannot_be_is_one_line(
    more: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ASKED, *more]) == code
    out, err = capsys.readouterr()
    assert said in err and not out and err.count("\n") == 1

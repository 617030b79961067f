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
    assert (told["rung"], found["bound"]["rung"]) == ("calibrated", "bound")


def test_a_mixture_of_experts_is_as_unsure_as_its_own_published_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = {}
    for model in ("llama3-8b", "qwen3-30b-a3b"):
        asked = ["simulate", f"examples/{model}.json", "-c", "hgx-h100", "--seq", "4k", "-b", "32"]
        assert main([*asked, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        wide[model] = found["seconds_high_80"] / found["seconds_low_80"]
        assert ("mixtures of experts" in found["source"]) == (model == "qwen3-30b-a3b")
    assert wide["qwen3-30b-a3b"] > 1.2 * wide["llama3-8b"]


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


UNEVEN = ("--pin", "tp=2", "--stages", "7,9,9,7")


def test_stages_have_the_layers_they_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, trace = tmp_path / "s.html", tmp_path / "s.json"
    assert main([*ASKED, *UNEVEN, "--html", str(page), "--trace", str(trace)]) == 0
    assert "stages of 7, 2 x 9, 7 layers" in " ".join(capsys.readouterr().out.split())
    assert "stages of 7, 2 x 9, 7 layers" in page.read_text(encoding="utf-8")
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    first = {
        e["pid"]: e["dur"] for e in events if e["ph"] == "X" and e["name"] == "F0"
        and not e["args"]["slowed_us"]
    }  # fmt: skip
    assert first[2] / first[1] == pytest.approx(1) and first[1] > first[0]
    peaks = {
        pid: max(e["args"]["bytes"] for e in events if e["ph"] == "C" and e["pid"] == pid)
        for pid in range(4)
    }
    assert peaks[1] > peaks[2]


def test_equal_stages_are_those_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for more in (("--pin", "pp=4", "--pin", "v=1"), ("--stages", "8,8,8,8")):
        assert main([*ASKED, "--pin", "tp=2", *more, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    plain, told = found
    assert told["seconds"] == pytest.approx(plain["seconds"], rel=1e-3)
    assert told["memory"]["peak_bytes"] == plain["memory"]["peak_bytes"]
    assert told["stage_layers"] == plain["stage_layers"] == [8] * 4


def test_fewer_layers_beside_the_head_are_faster(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {}
    for stages in ("8,8,8,8", "9,9,8,6"):
        assert main([*ASKED, "--pin", "tp=2", "--stages", stages, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        seconds[stages] = found["seconds"]
        assert found["seconds"] == pytest.approx(found["analytic_s"], rel=0.03)
    assert seconds["9,9,8,6"] < seconds["8,8,8,8"]


def test_a_step_is_simulated_in_an_order_of_the_axes(capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes: stages on one each, or side by side, where sends are faster."""
    sends = {}
    for order in ("tp-cp-dp-pp", "tp-cp-pp-dp"):
        more = ("-n", "2", "--pin", "pp=2", "--pin", "tp=1", "--order", order)
        assert main([*ASKED, *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["order"] == order
        sends[order] = found["layer"]["send"]
    assert sends["tp-cp-pp-dp"] < sends["tp-cp-dp-pp"]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--stages", "16,17"], 2, "stages 16,17 hold 33 layers, the model has 32"),
        (["--stages", "16,16", "--pin", "pp=4"], 2, "are 2 numbers of a plan with pp = 4"),
        (["--stages", "32,0"], 2, "leave one empty; give every stage 1 layer or more"),
        (["--stages", "33,-1"], 2, "'33,-1' is not a list of whole numbers"),
        (["--stages", "16.5,15.5"], 2, "is not a list of whole numbers"),
        (["--stages", "16;16"], 2, "is not a list of whole numbers"),
        (["--stages", ""], 2, "is not a list of whole numbers"),
        (["--stages", "17,15", "--pin", "v=2"], 2, "do not divide into 2 chunks each"),
        (["--stages", "17,15", "--schedule", "dualpipe"], 2, "dualpipe lays two parts"),
        (["--stages", "11,11,10"], 2, "pp=3 does not divide the 8 accelerators"),
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

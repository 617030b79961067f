"""`ridgeplan serve`: the answer in words and as JSON, passes alone, what is refused."""

from __future__ import annotations

import json

import pytest

from cli.main import main

ASKED = ["serve", "examples/llama3-8b.json", "-d", "h100-sxm", "-c", "16", "--osl", "256"]


def test_an_answer_is_told_with_its_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ASKED) == 0
    out = capsys.readouterr().out
    told = " ".join(out.split())
    for words in ("Output token", "First token", "pages of 16 tokens", "prompts of others",
                  "where the time to the first token goes", "wait for others' prompts",
                  "silicon samples"):  # fmt: skip
        assert words in told
    assert max(len(line) for line in out.splitlines()) <= 100


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--tp", "2", "--precision", "fp8", "-e", "trtllm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] and found["num_gpus"] == 2 and found["cache"] == "fp8"
    assert sum(found["seconds_by_part"].values()) == pytest.approx(found["tpot_s"])
    assert sum(found["ttft_by_part"].values()) == pytest.approx(found["ttft_s"])
    low, high = found["tpot_range_s"]
    assert low < found["tpot_s"] < high
    assert found["tokens_per_s_per_gpu"] == pytest.approx(found["tokens_per_s"] / 2)
    assert found["concurrency"] == found["in_flight"] == 16


def test_left_open_as_many_run_as_surely_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED[:4], "--isl", "8k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["concurrency"] == found["memory"]["safe_requests"] and not found["waiting"]


def test_passes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {}
    for name, more in (("prefill", []), ("decode", []), ("decode", ["--eager"])):
        assert main([*ASKED, "--phase", name, *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert sum(found["seconds_by_part"].values()) == pytest.approx(found["seconds"])
        seconds[name, *more] = found["seconds"]
    assert seconds["decode",] < seconds["decode", "--eager"]
    assert main([*ASKED, "--phase", "decode"]) == 0
    assert "Pass decode" in " ".join(capsys.readouterr().out.split())


def test_what_no_figure_was_held_against_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--pp", "2", "--eager", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert "Compared with no published figure: pipeline stages, eager decoding." in notes
    assert main([*ASKED, "--disaggregated"]) == 0
    assert "runs on other ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--tp", "3"], "3 tensor parallel ranks do not divide 32 heads"),
        (["--ep", "3"], "--ep 3 does not divide 1 ranks"),
        (["--tp", "0"], "below 1"),
        (["--pp", "33"], "33 stages are more than 32 layers"),
        (["-d", "nope"], "unknown device 'nope'"),
        (["-e", "orca"], "one of trtllm, vllm, sglang"),
        (["--precision", "int3"], "one of bf16, fp8"),
        (["--cache", "int8"], "unknown cache format 'int8'"),
        (["--phase", "train"], "unknown phase 'train'"),
        (["--isl", "0"], "--isl = '0' is not a whole number"),
        (["-c", "many"], "--concurrency"),
        (["--isl", "10M"], "not one request's cache fits"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ASKED, *more]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1

"""`ridgeplan plan tiles`: its answers for people and programs, and every bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main

FLASH = ("flash_attention_2", "-d", "a100-sxm4-80gb", "-p", "heads=8", "-p", "seq=2k", "-p",
         "dim=128")  # fmt: skip
RNN = ("flash_rnn", "-d", "h100-sxm", "-p", "head_dim=768")
MATMUL = ("matmul", "-d", "h100-sxm", "-p", "m=64", "-p", "n=64", "-p", "k=64")


def document(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main(["plan", "tiles", *args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    assert next(iter(found)) == "version"
    return found


def test_attention(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *FLASH)
    assert (found["status"], found["gap_frac"], found["instruction"]) == ("optimal", 0, "mma.sync")
    assert found["best"]["smem_bytes"] <= found["limits"]["smem_bytes_per_block"]
    times = [one["seconds"] for one in found["runners_up"]]
    assert times == sorted(times) and times[0] >= found["best"]["seconds"]
    curve = {p["more_smem_bytes"]: p["seconds"] for p in found["smem_curve"]}
    at = max(more for more in curve if more <= 0)
    assert curve[at] == found["best"]["seconds"]
    assert found["one_more_kib_s"] >= 0


def test_the_program_is_shown_with_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiles", *FLASH, "--explain"]) == 0
    out = capsys.readouterr().out
    assert "proven by exhaustion" in " ".join(out.split())
    assert "shared memory of a block, KiB: " in out and "<= 163" in out
    assert "optimal: " in out and "One more KiB" in out


def test_flash_rnn(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *RNN, "--explain")
    assert found["padded_head_dim"] == 768 and found["num_blocks"] <= 132
    assert "number of SMs (heads_beside, r_out, r_in, b_blocks): " in found["explanation"]
    assert main(["plan", "tiles", *RNN]) == 0
    assert "in the authors' order" in " ".join(capsys.readouterr().out.split())


def test_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, program = tmp_path / "tiles.html", tmp_path / "tiles.lp"
    assert main(["plan", "tiles", *MATMUL, "--html", str(page), "--lp", str(program)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert "shared memory a block may take" in page.read_text()
    assert "one_kernel" in program.read_text().replace(" ", "_")


def test_a_listing_cut_short_is_feasible_with_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    whole = document(capsys, *FLASH)
    assert whole["bound_s"] == whole["best"]["seconds"]
    for cut in (("--time-limit", "1ns"), ("--gap", "60%")):
        found = document(capsys, *FLASH, *cut)
        assert found["status"] == "feasible" and found["bindings"] == []
        assert found["bound_s"] <= whole["best"]["seconds"] <= found["best"]["seconds"]
        seconds = found["best"]["seconds"]
        assert found["gap_frac"] == pytest.approx((seconds - found["bound_s"]) / seconds)
        assert found["num_kernels"] < whole["num_kernels"]
    assert main(["plan", "tiles", *FLASH, "--time-limit", "1ns"]) == 0
    assert "not all listed" in " ".join(capsys.readouterr().out.split())


BAD: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no name": (("-d", "h100-sxm"), 2, "plan tiles --help"),
    "no device": (("matmul",), 2, "--device"),
    "another op": (("softmax", "-d", "h100-sxm"), 2, "give matmul, flash_attention_2, flash_rnn"),
    "no sizes": (("matmul", "-d", "h100-sxm"), 2, "matmul needs"),
    "a size of nothing": ((*MATMUL[:3], "-p", "m=0", *MATMUL[5:]), 2, "from 1"),
    "an old part": (("matmul", "-d", "t4", "-p", "dtype=fp16", *MATMUL[3:]), 2, "capability 8"),
    "a wide head": ((*FLASH[:-1], "dim=4k"), 3, "shared memory of a block"),
    "a long head": ((*RNN[:-1], "head_dim=8000"), 3, "number of SMs"),
    "an unknown key": ((*RNN, "-p", "heads=2"), 2, "did you mean num_heads"),
    "no time": ((*FLASH, "--time-limit", "0s"), 2, "above 0 s"),
    "a gap below nothing": ((*FLASH, "--gap", "-3%"), 2, "outside 0..1"),
    "no head": (RNN[:3], 2, "add -p head_dim=768"),
    "half a head": ((*RNN[:-1], "head_dim=7.5"), 2, "whole number"),
    "rules of nobody": ((*RNN, "-p", "rules=mine"), 2, "rule set"),
    "a picture of an rnn": ((*RNN, "--html", "a.html"), 2, "no curve"),
    "a format of nobody": ((*MATMUL, "--lp", "a.txt"), 2, "end it in .lp or .mps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_questions_are_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, code, words = BAD[case]
    assert main(["plan", "tiles", *args]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err

"""`ridgeplan scaling`: systems side by side, crossovers, families, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main

SHAPE = ["-p", "heads=8", "-p", "dim=64"]


def test_systems_stand_in_rows_and_lengths_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "attention", "flash_attention_2", *SHAPE, "--over", "seq=1k,4k"]) == 0
    out, err = capsys.readouterr()
    assert "seq 1k" in out and "seq 4k" in out and not err
    assert out.index("attention ") < out.index("flash_attention_2")


def test_json_holds_every_value_and_every_crossover(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["flashfftconv", "fft_convolution"]
    asked = [
        "scaling",
        *names,
        "-p",
        "channels=64",
        "-p",
        "batch=4",
        "--over",
        "seq=256:64k:x2",
        "--json",
    ]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] and [s["op"] for s in found["series"]] == names
    assert len(found["series"][0]["seconds"]) == len(found["over"]["values"]) == 9
    assert all(c["faster"] in names for c in found["crossovers"])


def test_a_family_brings_the_systems_that_can_be_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["scaling", "attention", "--family", "attention", *SHAPE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [s["op"] for s in found["series"]]
    assert names[0] == "attention" and "flash_attention_2" in names
    assert not set(found["left_out"]) & set(names)
    assert main(["scaling", "--family", "attention", *SHAPE]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(name in told for name in found["left_out"])


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "scaling.html"
    asked = ["scaling", "attention", "flash_attention_2", *SHAPE, "--html", str(page)]
    assert main(asked) == 0
    assert "flash_attention_2" in page.read_text(encoding="utf-8")
    assert f"wrote {page}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([], "name systems, or a family"),
        (["--family", "attentoin", *SHAPE], "did you mean attention"),
        (["attention", *SHAPE, "--over", "seq=1:1k:+1"], "more than 400 points"),
        (["--family", "attention"], "no modelled system of family attention can be asked"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    asked: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scaling", *asked]) == 2
    out, err = capsys.readouterr()
    assert says in err and not out and err.count("\n") == 1


def test_a_roofline_takes_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "roofline",
        "-d",
        "h100-sxm",
        "--family",
        "attention",
        *SHAPE,
        "-p",
        "seq=4k",
        "--json",
    ]
    assert main(asked) == 0
    places = json.loads(capsys.readouterr().out)["places"]
    assert "flash_attention_2" in {p["op"] for p in places}
    assert main(["roofline", "-d", "h100-sxm"]) == 2


def test_the_best_chunk_of_each_length_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["scaling", "linear_recurrence", *SHAPE, "--over", "seq=1k,16k", "--best", "chunk"]
    assert main([*asked, "--json"]) == 0
    (series,) = json.loads(capsys.readouterr().out)["series"]
    fixed = ["scaling", "linear_recurrence", *SHAPE, "--over", "seq=1k,16k", "--json"]
    for i, chunk in enumerate(series["best"]["chunk"]):
        assert main([*fixed, "-p", f"chunk={chunk}"]) == 0
        (alone,) = json.loads(capsys.readouterr().out)["series"]
        assert alone["seconds"][i] == pytest.approx(series["seconds"][i])
    assert main(asked) == 0
    assert "Best for linear_recurrence on h100-sxm: chunk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--best", "window"], "unknown choice for --best 'window'"),
        (["--best", "chunk", "-p", "chunk=32"], "chunk is given too"),
    ],
)
def test_a_choice_that_is_none_is_refused(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scaling", "linear_recurrence", *SHAPE, *more]) == 2
    assert said in capsys.readouterr().err

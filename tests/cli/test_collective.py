"""`ridgeplan collective`: what it tells, and what it refuses."""

from __future__ import annotations

import json

import pytest

from cli.main import main

Capture = pytest.CaptureFixture[str]


def test_it_tells_level_algorithm_and_protocol(capsys: Capture) -> None:
    code = main(["collective", "all_reduce", "-c", "hgx-h100", "-n", "4", "--bytes", "1G"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "32 ranks, over 4 nodes" in out and "infiniband_ndr" in out
    assert "protocol Simple" in out and "nvls tree" in out and "LL128" in out


def test_the_document_holds_every_way_fastest_first(capsys: Capture) -> None:
    argv = ("all_gather", "-c", "dgx-a100-80gb", "-n", "16", "-b", "256MiB", "--ranks", "16")
    assert main(["collective", *argv, "--stride", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["algorithm"], found["protocol"], found["group_nodes"]) == ("ring", "Simple", 16)
    times = [way["seconds"] for way in found["ways"]]
    assert times == sorted(times) and len(times) == 3
    assert found["low_s"] < found["seconds"] < found["high_s"]
    assert found["bound_s"] < found["seconds"] and found["num_bytes"] == 2**28


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("all_reduce", "-b", "1M", "--ranks", "3"), "do not tile the 16 accelerators of hgx-h100"),
        (("all_reduce", "-b", "1M", "--ranks", "1"), "--ranks 1: give 2 or more"),
        (("all_reduce", "-b", "1M", "--stride", "0"), "--stride 0: give 1 or more"),
        (("all_reduce", "-b", "0"), "whole number of bytes"),
        (("all_reduce", "-b", "1.5B"), "whole number of bytes"),
        (("all_sum", "-b", "1M"), "all_sum"),
    ],
)
def test_bad_input_is_one_line(argv: tuple[str, ...], said: str, capsys: Capture) -> None:
    code = main(["collective", *argv, "-c", "hgx-h100", "-n", "2"])
    out, err = capsys.readouterr()
    assert code == 2 and not out
    assert said in err and err.count("\n") == 1

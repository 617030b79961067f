"""The program as a whole: exit codes, one-line errors, light starts, pipes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cli import __version__
from cli import main as main_module
from cli.main import main
from hwmodels.calibration import FOLDER
from tests.cli.running import ROOT, python, ridgeplan
from tests.synthetic import gemm_rows, write_rows
from tests.validate.fake_suite import record_of, trials

HEAVY = {"numpy", "plotly", "networkx", "scipy", "pulp", "pandas", "torch", "kaleido"}
MATMUL = ("matmul", "-p", "m=64", "-p", "n=64", "-p", "k=64")
SQUARE = ("-p", "n=64", "-p", "k=64")


def modules_after(*args: str) -> set[str]:
    code = (
        "import sys, io; real = sys.stdout; sys.stdout = io.StringIO()\n"
        "from cli.main import main; code = main(sys.argv[1:]); sys.stdout = real\n"
        "print(code, *sys.modules)"
    )
    done = python(code, *args)
    assert done.returncode == 0, done.stderr
    code_text, *modules = done.stdout.split()
    assert code_text == "0"
    return set(modules)


def test_help_loads_nothing_heavy() -> None:
    assert not modules_after("--help") & HEAVY
    assert not modules_after("sweep", "--help") & HEAVY


def test_listing_devices_loads_no_numpy() -> None:
    assert not modules_after("devices") & HEAVY


def test_estimate_loads_only_what_it_computes_with() -> None:
    loaded = modules_after("estimate", *MATMUL, "--device", "h100-sxm")
    assert "numpy" in loaded  # the probe sees imports
    assert not loaded & {"torch", "pandas", "scipy.optimize", "plotly", "networkx", "kaleido"}


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ridgeplan {__version__}\n"
    assert main([]) == 0
    assert "estimate" in capsys.readouterr().out


CLAIMS = {
    "id": "flash_attention_2",
    "family": "attention",
    "claims": [{"quantity": "bwd attention fraction of peak", "value": 0.5, "unit": "fraction",
                "setting": {"gpu": "A100"}, "kind": "mfu"}],
}  # fmt: skip


def examples_in_help() -> list[str]:
    texts = [main_module._main.__doc__ or ""]
    texts += [command.callback.__doc__ or "" for command in main_module.app.registered_commands]
    joined = [re.sub(r"\\\n\s*", "", text) for text in texts]
    lines = [line.strip() for text in joined for line in text.splitlines()]
    return [
        line for line in lines if line.startswith("ridgeplan ") and not line.startswith(NEEDS_A_GPU)
    ]


NEEDS_A_GPU = "ridgeplan profile"


@pytest.mark.parametrize("example", examples_in_help())
def test_the_examples_in_the_help_work(
    example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "hwmodels" / "data" / "devices" / "h100-sxm.toml", tmp_path / "my-gpu.toml")
    for name in ("measured", "calibrations"):
        (tmp_path / name).mkdir()
    for folder in ("measured", "."):
        write_rows(tmp_path / folder / "kernels_gemm.csv", gemm_rows(count=120))
    shutil.copy(FOLDER / "t4.json", tmp_path / "mine.json")
    (tmp_path / "claims.json").write_text(json.dumps([CLAIMS]))
    (tmp_path / "batch.txt").write_text("8192\n1024\n300\n300\n")
    found = json.loads((FOLDER / "h100-sxm.json").read_text())
    (tmp_path / "calibrations" / "h200-sxm.json").write_text(
        json.dumps(found | {"device": "h200-sxm"})
    )
    for number, name in enumerate(("monday", "tuesday")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text(f"{record_of(trials(3)[number]).line()}\n")
    (tmp_path / "h200").mkdir()
    records = [record_of(trial) for trial in trials(12)]
    lines = [replace(r, environment=replace(r.environment, gpu="H200")).line() for r in records]
    (tmp_path / "h200" / "records.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(example)[1:]) == 0
    out, err = capsys.readouterr()
    assert out and not err


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("command", ["", *main_module.COMMANDS])
def test_help_keeps_to_the_page(
    command: str,
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    # An example is a line to copy: it is not broken, even on a narrow page.
    lines = [line for line in out.splitlines() if not line.strip().startswith("ridgeplan ")]
    assert max(len(line) for line in lines) <= min(columns, 100)
    assert max(len(line) for line in out.splitlines()) <= 100
    assert out.startswith("Usage: ridgeplan")


def test_help_tells_each_command_in_a_whole_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in main_module.COMMANDS)
    assert "..." not in out.split("Commands:")[1]


BAD = {
    "no such command": (("estimat",), "estimate"),
    "no such option": (("estimate", "matmul", "--devise", "x"), "--device"),
    "missing argument": (("estimate",), "estimate --help"),
    "missing option": (("estimate", *MATMUL), "--device"),
    "unknown device": (("estimate", *MATMUL, "-d", "h1000-sxm"), "did you mean h100-sxm"),
    "unknown op": (("estimate", "matmull", "-d", "h100-sxm"), "did you mean matmul"),
    "not modelled": (("estimate", "lra", "-d", "h100-sxm"), "not modelled yet"),
    "unknown param": (("estimate", *MATMUL, "-p", "batches=1", "-d", "h100-sxm"), "batch"),
    "missing param": (("estimate", "matmul", "-p", "m=1", "-d", "h100-sxm"), "needs n, k"),
    "not key=value": (("estimate", *MATMUL, "-p", "batch", "-d", "h100-sxm"), "key=value"),
    "twice": (("estimate", *MATMUL, "-p", "m=1", "-d", "h100-sxm"), "m is given twice"),
    "twice by alias": (
        ("estimate", "attention", "-p", "heads=1", "-p", "num_heads=2", "-p", "seq=1",
         "-p", "dim=1", "-d", "h100-sxm"),
        "num_heads is given twice",
    ),
    "negative": (("estimate", "matmul", "-p", "m=-4", *SQUARE, "-d", "h100-sxm"), "m = -4"),
    "zero": (("estimate", "matmul", "-p", "m=0", *SQUARE, "-d", "h100-sxm"), "m = 0"),
    "fraction": (("estimate", "matmul", "-p", "m=1.5", *SQUARE, "-d", "h100-sxm"), "m = 1.5"),
    "garbage": (("estimate", "matmul", "-p", "m=lots", *SQUARE, "-d", "h100-sxm"), "'lots'"),
    "newline": (("estimate", "matmul", "-p", "m=1\n2", *SQUARE, "-d", "h100-sxm"), "'1 2'"),
    "dtype": (("estimate", *MATMUL, "-p", "dtype=bf61", "-d", "h100-sxm"), "did you mean bf16"),
    "bf16 on T4": (
        ("estimate", *MATMUL, "-d", "t4"),
        "t4 has no bf16 rate; choose a format it computes: fp16",
    ),
    "fp8 on A100": (
        ("estimate", *MATMUL, "-p", "dtype=fp8", "-d", "a100-sxm4-80gb"),
        "a100-sxm4-80gb has no fp8 rate",
    ),
    "no device file": (("estimate", *MATMUL, "-d", "./none.toml"), "does not exist"),
    "unknown cluster": (("clusters", "hgx-h10"), "did you mean hgx-h100"),
    "nodes alone": (("clusters", "--nodes", "2"), "--nodes needs the name"),
    "nodes zero": (("clusters", "hgx-h100", "--nodes", "0"), "nodes is 0"),
    "nodes word": (("clusters", "hgx-h100", "--nodes", "two"), "'--nodes'"),
    "range": (("sweep", "matmul", *SQUARE, "--over", "m=1:2"), "is not a range"),
    "step": (("sweep", "matmul", *SQUARE, "--over", "m=1:8:2"), "neither a factor"),
    "factor": (("sweep", "matmul", *SQUARE, "--over", "m=1:8:x1"), "must be above 1"),
    "backwards": (("sweep", "matmul", *SQUARE, "--over", "m=8:1:x2"), "1 <= start <= stop"),
    "endless": (("sweep", "matmul", *SQUARE, "--over", "m=1:1e12:+1"), "points"),
    "not a size": (("sweep", "matmul", *SQUARE, "--over", "dtype=fp16,bf16"), "not a size"),
    "foreign param": (("sweep", "matmul", *SQUARE, "--over", "m=1,2", "-p", "heads=1"), "heads"),
    "prefix": (
        ("sweep", "matmul", *SQUARE, "--over", "m=1,2", "-p", "softmax.rows=1"),
        "softmax is not asked for",
    ),
    "over twice": (("sweep", *MATMUL, "--over", "m=1,2"), "m is given twice"),
    "roofline format": (("roofline", *MATMUL, "-d", "t4", "--out", "x.gif"), "no known format"),
}  # fmt: skip


def one_line_of(error_text: str) -> str:
    assert error_text.startswith("ridgeplan: error: ")
    assert error_text.endswith("\n")
    assert error_text.count("\n") == 1, error_text
    return error_text


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in one_line_of(err)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_in_a_process_of_its_own() -> None:
    done = ridgeplan("estimate", *MATMUL, "-d", "h1000")
    assert done.returncode == 2
    assert done.stdout == ""
    one_line_of(done.stderr)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe\x00", "UTF-8"),
        (b"schema = 1\nid = ", "not valid TOML"),
        (b"schema = 1\nid = 'x'\n", "missing"),
    ],
)
def test_a_broken_device_file_is_one_line(
    content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    assert main(["estimate", *MATMUL, "-d", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in one_line_of(err)
    assert "mine.toml" in err


def test_a_folder_in_place_of_a_device_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", f"{tmp_path}/"]) == 2
    assert "not a regular file" in one_line_of(capsys.readouterr().err)


OUTPUTS = {
    "csv": ("sweep", *MATMUL[:1], *SQUARE, "--over", "m=1,2", "--csv"),
    "html": ("sweep", *MATMUL[:1], *SQUARE, "--over", "m=1,2", "--html"),
    "roofline": ("roofline", *MATMUL, "-d", "h100-sxm", "--html"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("place", ["folder.html", "missing/f.html"])
def test_an_unwritable_output_is_refused_before_anything_is_written(
    kind: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    assert main([*OUTPUTS[kind], str(tmp_path / place)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot write" in one_line_of(err)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder.html"]


def test_two_outputs_to_one_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "x.html")
    assert main([*OUTPUTS["html"], file, "--csv", file]) == 2
    assert "given twice" in one_line_of(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_met_with_silence() -> None:
    command = [sys.executable, "-c", "from cli.main import run; run()", "devices", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-c", "from cli.main import run; run()", "devices"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )
    assert done.returncode == 2
    assert one_line_of(done.stderr).endswith("No space left on device\n")


def test_an_interrupt_and_an_infeasible_answer_have_their_own_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hwmodels import catalog
    from hwmodels.errors import InfeasibleError

    def interrupted() -> None:
        raise KeyboardInterrupt

    def infeasible() -> None:
        raise InfeasibleError("nothing fits:\n80 GB is too little")

    monkeypatch.setattr(catalog, "device_ids", interrupted)
    assert main(["devices"]) == 130
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(catalog, "device_ids", infeasible)
    assert main(["devices"]) == 3
    assert one_line_of(capsys.readouterr().err).endswith("nothing fits: 80 GB is too little\n")


def test_a_defect_of_ours_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from hwmodels import catalog

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(catalog, "device_ids", broken)
    with pytest.raises(ZeroDivisionError):
        main(["devices"])

"""`python -m validate.profile`: from a bare checkout, watched, resumed, replayed to the end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwmodels.errors import InputError
from tests.cli.running import ROOT
from tests.validate.fake_suite import record_of, suite, trials
from validate import profile as module
from validate.profile import Options, line_of, options_of, profile
from validate.profile_worker import work
from validate.record import RecordWriter
from validate.session import read_store


@pytest.fixture()
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose worker follows the file `script`."""
    monkeypatch.setattr(module, "WORKER", "tests.validate.fake_worker")
    monkeypatch.setattr(module, "SILENCE_S", 2.0)
    return tmp_path


def run(folder: Path, *script: str) -> tuple[Any, list[Mapping[str, Any]]]:
    (folder / "script").write_text(" ".join(script))
    events: list[Mapping[str, Any]] = []
    return profile(Options(suite="quick", out=folder), events.append), events


def test_whatever_takes_the_process_along_costs_one_trial(watched: Path) -> None:
    script = ["ok", "segfault", "ok", "ok", "lose", "ok", "ok"]
    done, events = run(watched, *script)
    store = read_store(watched)
    taken = [(trials(4).index(e.trial), e.kind) for e in store.refused]
    assert taken == [(1, "lost"), (3, "lost"), (4, "lost"), (5, "lost"), (6, "lost")]
    reasons = [e.reason for e in store.refused]
    assert "signal 11" in reasons[0] and "not run: one like it" in reasons[1]
    assert "illegal memory access" in reasons[2] and "illegal" in reasons[4]
    assert len(store.records) == 2
    assert (done.measured, done.refused, done.known, done.late) == (2, 5, 0, 0)
    assert sum(event["event"] == "again" for event in events) == 2
    assert all(line_of(event) for event in events)


def test_a_trial_without_end_is_ended(watched: Path) -> None:
    done, _ = run(watched, "ok", "exit", "hang")
    first, entry = read_store(watched).refused
    assert first.kind == "lost" and "code 3" in first.reason
    assert entry.kind == "hung" and "no end within 2 s" in entry.reason
    assert done.refused == 2 and len(read_store(watched).records) == 1


def test_a_worker_that_cannot_begin_is_one_line(watched: Path) -> None:
    with pytest.raises(InputError, match="code 1 before any trial: libcuda is missing"):
        run(watched, "nothing")
    with pytest.raises(InputError, match="no CUDA GPU is visible"):
        run(watched, "refuse")


BARE = """
import importlib.abc, sys
TORCH_NEEDS = {"filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "fsspec",
               "markupsafe", "setuptools", "_distutils_hack", "functorch", "torchgen", "isympy"}
OPEN = {"hwmodels", "workloads", "simulator", "validate", "torch", "triton", "numpy",
        "sitecustomize", *TORCH_NEEDS, *sys.stdlib_module_names, *sys.builtin_module_names}
class Closed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        if top not in OPEN and not top.startswith("_sysconfig"):
            raise ModuleNotFoundError(f"No module named {name!r} (closed)", name=name)
        return None
sys.meta_path.insert(0, Closed())
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that finds torch, triton and numpy alone."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BARE)
    return {**os.environ, "PYTHONPATH": str(folder)}


def bare_profile(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "validate.profile", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_the_hook_closes_what_is_not_named(bare: dict[str, str]) -> None:
    for name in ("scipy", "rich", "typer", "pandas"):
        command = [sys.executable, "-c", f"import {name}"]
        done = subprocess.run(command, env=bare, capture_output=True, text=True)
        assert done.returncode == 1 and "(closed)" in done.stderr


def test_a_bare_checkout_profiles_with_torch_triton_and_numpy(
    bare: dict[str, str], tmp_path: Path
) -> None:
    from validate.agenda import agenda

    planned = [item.trial for item in agenda("quick", "h100-sxm", points=4).items]
    stored = tmp_path / "stored.jsonl"
    with RecordWriter(stored) as writer:
        writer.append(record_of(trials(1)[0]))
        for trial in planned[1:]:
            writer.append(record_of(trial, 1e-5, row=None) if trial.kernel in ("gemm", "map")
                          else _plain(trial))  # fmt: skip
    out = tmp_path / "out"
    arguments = ["--suite", "quick", "--points", "4", "--out", str(out), "--replay", str(stored)]
    done = bare_profile(bare, *arguments)
    assert done.returncode == 0, done.stderr
    store = read_store(out)
    assert len(store.records) + len(store.refused) == len(planned)
    assert f"{len(planned)} trials" in done.stderr
    if planned:
        again = bare_profile(bare, *arguments)
        assert again.returncode == 2
        assert again.stderr.count("\n") == 1 and "--resume" in again.stderr


def _plain(trial: Any) -> Any:
    base = record_of(trials(1)[0], 1e-5, row=None)
    return replace(
        base, kernel=trial.kernel, implementation=trial.implementation, vendor="", case=trial.case
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seconds", "-1"], "--seconds -1: give a positive number"),
        (["--points", "0"], "give at least 1"),
        (["--replay", "nowhere.jsonl"], "no such file"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def given(folder: Path, **more: Any) -> dict[str, Any]:
    plain = {"suite": "quick", "kernels": [], "points": None, "resume": False}
    return {**plain, "retry_before": "", "replay": None, "until": 1e18, "out": str(folder), **more}


def test_the_worker_names_what_it_cannot_do(tmp_path: Path) -> None:
    import torch

    stored = tmp_path / "stored.jsonl"
    stored.write_text(record_of(trials(1)[0]).line() + "\n")
    with pytest.raises(InputError, match="unknown kernel 'nonesuch'"):
        work(given(tmp_path / "out", kernels=["nonesuch"], replay=str(stored)))
    with pytest.raises(InputError, match="collectives need two GPUs or more"):
        work(given(tmp_path / "out", kernels=["collectives"], replay=str(stored)))
    stray = replace(record_of(trials(1)[0]).environment, gpu="NVIDIA Z9")
    stored.write_text(record_of(trials(1)[0], environment=stray).line() + "\n")
    with pytest.raises(InputError, match="'NVIDIA Z9' is in no catalogue"):
        work(given(tmp_path / "out", replay=str(stored)))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="CUDA"):
            work(given(tmp_path / "out"))


@pytest.mark.parametrize(
    ("version", "count", "capability", "said"),
    [
        (None, 0, (0, 0), "built without CUDA"),
        ("13.0", 0, (0, 0), "no CUDA GPU is visible"),
        ("13.0", 1, (7, 0), "has compute capability 7.0; the kernels need 8.0 or later"),
        ("13.0", -1, (9, 0), "CUDA does not start: The NVIDIA driver on your system is too old"),
    ],
)
def test_why_a_gpu_will_not_do(
    version: str | None,
    count: int,
    capability: tuple[int, int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from validate.torch_gpu import open_gpu

    def init() -> None:
        if count < 0:
            raise RuntimeError("The NVIDIA driver on your system is too old (found 11040).\nUpdate")

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(torch, "zeros", lambda *args, **more: torch.ones(1))
    with pytest.raises(InputError) as why:
        open_gpu()
    assert said in str(why.value) and "\n" not in str(why.value)


def test_options() -> None:
    found = options_of(["--out", "x", "--kernel", "a", "--kernel", "b", "--suite", "full"])
    assert found.kernels == ("a", "b") and 20 * 60 < found.budget_s <= 25 * 60
    assert Options(suite="quick", out=Path("x"), seconds=9).budget_s == 9
    assert len(suite(3)) == 2

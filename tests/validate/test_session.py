"""A session loses nothing to a kill, keeps its deadline, and guards its folder."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwmodels.errors import InputError
from tests.cli.running import ROOT
from tests.validate.fake_suite import ENVIRONMENT, record_of, trials
from tests.validate.killed_profile import REFUSED_EVERY
from validate.agenda import Item
from validate.record import Environment, Record, Trial, read_records, read_refused
from validate.session import (
    Event,
    Summary,
    kind_of,
    locked,
    read_store,
    refusal,
    refuse,
    running,
    session,
    write_whole,
)
from validate.timer import DeviceLost, ReplayTimer, Unmeasured

PLANNED = trials(8)
PLAN = [Item(trial, 1e-5, 1.0) for trial in PLANNED]
REPLAY = ReplayTimer([record_of(trial) for trial in PLANNED])
NEVER = 1e18


class Scripted:
    """A timer that does to some trials what it is told."""

    environment: Environment = ENVIRONMENT

    def __init__(self, script: dict[int, Exception]) -> None:
        self._script = {PLANNED[i].key: error for i, error in script.items()}
        self.asked: list[Trial] = []

    def measure(self, trial: Trial) -> Record:
        self.asked.append(trial)
        if trial.key in self._script:
            raise self._script[trial.key]
        return record_of(trial)


def keys(folder: Path) -> list[str]:
    return [r.trial.key for r in read_records(folder / "records.jsonl").records]


def test_every_trial_gets_one_line(tmp_path: Path) -> None:
    timer = Scripted({2: Unmeasured("memory", "out of\nmemory")})
    events: list[Event] = []
    done = session(PLAN, timer, tmp_path, deadline_s=NEVER, say=events.append)
    assert done == Summary(measured=len(PLAN) - 1, refused=1)
    assert sorted([*keys(tmp_path), PLANNED[2].key]) == sorted(t.key for t in PLANNED)
    (entry,) = read_refused(tmp_path / "refusals.jsonl")
    assert entry.trial == PLANNED[2] and entry.reason == "out of memory"
    assert [e.number for e in events] == list(range(1, len(PLAN) + 1))
    assert running(tmp_path) is None
    noted = json.loads((tmp_path / "environment.json").read_text())
    assert noted["sessions"][0]["environment"]["gpu"] == ENVIRONMENT.gpu


def test_a_second_session_passes_over_what_has_a_line(tmp_path: Path) -> None:
    session(PLAN[:5], Scripted({2: Unmeasured("wrong", "x")}), tmp_path, deadline_s=NEVER)
    again = Scripted({})
    done = session(PLAN, again, tmp_path, deadline_s=NEVER, resume=True)
    assert done == Summary(measured=len(PLAN) - 5, known=5) and len(again.asked) == len(PLAN) - 5
    retried = session(PLAN, Scripted({}), tmp_path, deadline_s=NEVER, resume=True, retry_before="9")
    assert retried.measured == 1 and len(keys(tmp_path)) == len(PLAN)
    assert len(json.loads((tmp_path / "environment.json").read_text())["sessions"]) == 3


def test_a_folder_with_records_is_not_written_to_by_accident(tmp_path: Path) -> None:
    session(PLAN[:1], REPLAY, tmp_path, deadline_s=NEVER)
    with pytest.raises(InputError, match="holds 1 records already; give --resume"):
        session(PLAN, REPLAY, tmp_path, deadline_s=NEVER)


def test_records_of_another_gpu_are_not_mixed(tmp_path: Path) -> None:
    session(PLAN[:1], REPLAY, tmp_path, deadline_s=NEVER)
    other = Scripted({})
    other.environment = replace(ENVIRONMENT, gpu="NVIDIA H200")
    with pytest.raises(InputError, match="holds records of H100-SXM-80GB, this is NVIDIA H200"):
        session(PLAN, other, tmp_path, deadline_s=NEVER, resume=True)
    assert len(keys(tmp_path)) == 1


def test_one_session_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="another profile is writing there"):
        session(PLAN, REPLAY, tmp_path, deadline_s=NEVER)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        session(PLAN, REPLAY, file, deadline_s=NEVER)


def test_the_deadline_is_kept_and_shorter_trials_fill_what_is_left(tmp_path: Path) -> None:
    now = [0.0]

    class Ticking(Scripted):
        def measure(self, trial: Trial) -> Record:
            now[0] += next(item.cost_s for item in plan if item.trial == trial)
            return super().measure(trial)

    plan = [Item(t, 1e-5, 6.0 if i == 2 else 2.0) for i, t in enumerate(PLANNED)]
    timer = Ticking({})
    done = session(plan, timer, tmp_path, deadline_s=9.0, clock=lambda: now[0])
    assert now[0] <= 9.0
    assert timer.asked == [PLANNED[0], PLANNED[1], PLANNED[3], PLANNED[4]]
    assert done.late == len(plan) - 4 and done.measured == 4


def test_costs_are_learned_from_what_trials_really_took(tmp_path: Path) -> None:
    now = [0.0]

    class Slower(Scripted):
        def measure(self, trial: Trial) -> Record:
            now[0] += 1.4
            return super().measure(trial)

    session(PLAN, Slower({}), tmp_path, deadline_s=20.0, clock=lambda: now[0])
    assert now[0] <= 20.0


def test_a_lost_device_ends_the_session_with_its_trial_refused(tmp_path: Path) -> None:
    done = session(PLAN, Scripted({3: DeviceLost("illegal access")}), tmp_path, deadline_s=NEVER)
    assert done.lost and done.measured == 3
    (entry,) = read_refused(tmp_path / "refusals.jsonl")
    assert entry.kind == "lost" and "illegal access" in entry.reason
    again = Scripted({})
    rest = session(PLAN, again, tmp_path, deadline_s=NEVER, resume=True)
    like = [t for t in PLANNED[4:] if kind_of(t) == kind_of(PLANNED[3])]
    assert rest.refused == len(like) > 0 and not set(map(str, like)) & set(map(str, again.asked))
    assert rest.measured == len(PLAN) - 4 - len(like)
    entry = read_refused(tmp_path / "refusals.jsonl")[-1]
    assert entry.reason == "not run: one like it illegal access"
    retried = session(PLAN, again, tmp_path, deadline_s=NEVER, resume=True, retry_before="9")
    assert retried.measured == len(like) + 1


def test_the_trial_that_took_the_process_along_is_known(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    with pytest.raises(Killed):
        session(PLAN, Scripted({1: Killed()}), tmp_path, deadline_s=NEVER)
    assert running(tmp_path) == PLANNED[1]
    refuse(tmp_path, refusal(PLANNED[1], ENVIRONMENT.gpu, "hung", "no end"))
    done = session(PLAN, Scripted({}), tmp_path, deadline_s=NEVER, resume=True)
    like = sum(kind_of(t) == kind_of(PLANNED[1]) for t in PLANNED[2:])
    assert done == Summary(measured=len(PLAN) - 2 - like, refused=like, known=2)
    assert running(tmp_path) is None


def test_sixty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    script = [sys.executable, "-m", "tests.validate.killed_profile", str(tmp_path), "60", "11"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["60", "0"], done.stderr
    planned = trials(110)
    store = read_store(tmp_path)
    assert [t.key for t in planned[::REFUSED_EVERY]] == [e.trial.key for e in store.refused]
    measured = [r.trial.key for r in store.records]
    assert len(measured) == len(set(measured))
    refused = {e.trial.key for e in store.refused}
    assert [t.key for t in planned if t.key not in refused] == measured


def test_wherever_a_file_is_cut_the_next_session_mends_it(tmp_path: Path) -> None:
    plan = PLAN[:10]
    whole = tmp_path / "whole"
    timer = Scripted({2: Unmeasured("wrong", "x"), 9: Unmeasured("memory", "y")})
    session(plan, timer, whole, deadline_s=NEVER)
    rng = random.Random(3)
    texts = {name: (whole / name).read_bytes() for name in ("records.jsonl", "refusals.jsonl")}
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_bytes(text[: rng.randrange(len(text) + 1)])
        kept = {r.trial.key for r in read_store(folder).records}
        session(plan, timer, folder, deadline_s=NEVER, resume=True)
        store = read_store(folder)
        measured = [r.trial.key for r in store.records]
        refused = [e.trial.key for e in store.refused]
        assert kept <= set(measured)
        assert sorted(measured + refused) == sorted(t.key for t in PLANNED[:10])


def test_a_half_written_note_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"sessions": [')
    (tmp_path / "current.json").write_text('{"trial": {"kernel"')
    assert running(tmp_path) is None
    session(PLAN[:1], REPLAY, tmp_path, deadline_s=NEVER)
    found: dict[str, Any] = json.loads((tmp_path / "environment.json").read_text())
    assert len(found["sessions"]) == 1
    write_whole(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}

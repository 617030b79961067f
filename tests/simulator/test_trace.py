"""Chrome traces: every task once, streams named, sends as flows, memory as a counter."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from simulator.engine import Task
from simulator.recipe import RECIPES
from simulator.step_memory import all_stages
from simulator.timeline import SEND, StepTimeline
from simulator.trace import trace_events
from tests.simulator.random_plans import CONFIGS
from tests.simulator.test_timeline import simulated
from workloads.models.transformer import train_step
from workloads.plan import Plan


@pytest.fixture(scope="module")
def found() -> StepTimeline:
    return simulated(Plan(dp=2, tp=2, pp=4, interleave=2, micro_batch=1, zero_stage=1))


def test_every_task_is_a_slice_of_its_length(found: StepTimeline) -> None:
    slices = [e for e in trace_events(found)["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == len(found.timeline.tasks)
    end = max(e["ts"] + e["dur"] for e in slices)
    assert end == pytest.approx(found.seconds * 1e6)
    on_path = [e for e in slices if e["args"]["critical"]]
    assert sum(e["dur"] for e in on_path) == pytest.approx(found.seconds * 1e6)


def test_slices_of_a_thread_do_not_overlap(found: StepTimeline) -> None:
    last: dict[tuple[int, int], float] = {}
    slices = [e for e in trace_events(found)["traceEvents"] if e["ph"] == "X"]
    for e in sorted(slices, key=lambda e: (e["ts"], e["dur"])):
        place = e["pid"], e["tid"]
        assert e["ts"] >= last.get(place, 0.0) - 1e-6
        last[place] = e["ts"] + e["dur"]


def test_processes_and_threads_are_named(found: StepTimeline) -> None:
    events = trace_events(found)["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events
             if e["ph"] == "M" and e["name"] == "thread_name"}  # fmt: skip
    used = {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}
    assert used == set(names)
    assert {names[s, 0] for s in range(4)} == {"compute"}
    assert "link to 1" in names.values() and "gather" in names.values()


def test_every_send_is_a_flow_with_both_ends(found: StepTimeline) -> None:
    events = trace_events(found)["traceEvents"]
    flows = Counter((e["id"], e["ph"]) for e in events if e["ph"] in "sf")
    sends = [i for i, t in enumerate(found.timeline.tasks) if t.kind == SEND]
    assert flows == Counter((i, ph) for i in sends for ph in "sf")


def test_a_counter_tells_the_live_bytes_of_every_stage(found: StepTimeline) -> None:
    step = train_step(CONFIGS[0], len_seq=2048, global_batch=16)
    stages = list(all_stages(found, step, recipe=RECIPES["bf16"]))
    events = trace_events(found, memory=stages)["traceEvents"]
    for own in stages:
        told = [e for e in events if e["ph"] == "C" and e["pid"] == own.stage]
        assert max(e["args"]["bytes"] for e in told) == own.peak_bytes
        times = [e["ts"] for e in told]
        assert times == sorted(times) and times[-1] <= found.seconds * 1e6


def test_it_is_json(found: StepTimeline) -> None:
    assert json.loads(json.dumps(trace_events(found)))["displayTimeUnit"] == "ms"
    assert isinstance(found.timeline.tasks[0], Task)

"""Chrome trace JSON of a timeline, as Perfetto and chrome://tracing open it.

Every stage is a process, every stream of it a thread; what one stage sends another is a flow from
the pass that made it to the pass that waits for it. Times are microseconds (Trace Event Format,
Google, 2016: phases X, s, f, M, C). A counter per stage shows its live bytes
(`simulator.step_memory`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from simulator.engine import Task, Timeline
from simulator.step_memory import StageMemory
from simulator.timeline import SEND, StepTimeline

MICRO = 1e6


def trace_events(found: StepTimeline, *, memory: Iterable[StageMemory] = ()) -> dict[str, Any]:
    """The document: {"traceEvents": [...], "displayTimeUnit": "ms"}."""
    line = found.timeline
    events = [*_names(line.tasks), *_slices(line), *_flows(line), *_counters(memory)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _place(task: Task) -> tuple[int, str]:
    """Process and thread: the stage, and what of it; a link belongs to the sender."""
    word, _, rest = task.stream.partition(" ")
    stage = int(rest.split("-")[0]) if rest and rest.split("-")[0].isdigit() else 0
    name = {"stage": "compute", "link": f"link to {rest.split('-')[-1]}"}.get(word, word)
    return stage, name


def _threads(tasks: Sequence[Task]) -> dict[tuple[int, str], int]:
    found: dict[tuple[int, str], int] = {}
    for place in sorted({_place(t) for t in tasks}, key=lambda p: (p[0], p[1] != "compute", p[1])):
        found[place] = sum(1 for stage, _ in found if stage == place[0])
    return found


def _names(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
    threads = _threads(tasks)
    for stage in sorted({stage for stage, _ in threads}):
        yield {"ph": "M", "name": "process_name", "pid": stage, "tid": 0,
               "args": {"name": f"stage {stage}"}}  # fmt: skip
    for (stage, name), thread in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": stage, "tid": thread,
               "args": {"name": name}}  # fmt: skip


def _slices(line: Timeline) -> Iterator[dict[str, Any]]:
    threads, critical = _threads(line.tasks), set(line.critical_path())
    slowed = line.slowed_s
    for i, task in enumerate(line.tasks):
        place = _place(task)
        yield {
            "ph": "X", "name": task.name, "cat": task.kind, "pid": place[0],
            "tid": threads[place],
            "ts": float(line.start_s[i]) * MICRO,
            "dur": float(line.end_s[i] - line.start_s[i]) * MICRO,
            "args": {"alone_us": task.seconds * MICRO, "slowed_us": float(slowed[i]) * MICRO,
                     "critical": i in critical},
        }  # fmt: skip


def _flows(line: Timeline) -> Iterator[dict[str, Any]]:
    """From the end of what is sent to the start of what waits for it."""
    threads = _threads(line.tasks)
    for i, task in enumerate(line.tasks):
        for sent in (j for j in task.after if line.tasks[j].kind == SEND):
            for phase, at, when in (("s", sent, line.start_s[sent]), ("f", i, line.start_s[i])):
                place = _place(line.tasks[at])
                yield {"ph": phase, "name": "send", "cat": SEND, "id": sent, "pid": place[0],
                       "tid": threads[place], "ts": float(when) * MICRO,
                       **({"bp": "e"} if phase == "f" else {})}  # fmt: skip


def _counters(stages: Iterable[StageMemory]) -> Iterator[dict[str, Any]]:
    """Live bytes of every stage, whenever they change."""
    for own in stages:
        for when, live in zip(own.when_s.tolist(), own.live_bytes.tolist(), strict=True):
            yield {"ph": "C", "name": "memory", "pid": own.stage, "tid": 0, "ts": when * MICRO,
                   "args": {"bytes": live}}  # fmt: skip

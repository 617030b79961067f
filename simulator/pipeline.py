"""A pipeline schedule on the event engine: passes as tasks, sends between stages on links.

Each stage computes on one stream; every link from a stage to another, in each direction, is a
stream of its own, so that sends run under computation. A pass waits for the activations or
gradients of the neighbouring part; what stays on a stage needs no send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hwmodels.errors import InputError
from simulator.engine import Task, Timeline, run
from simulator.schedule import (
    BACKWARD,
    BOTH,
    FORWARD,
    INPUT_GRAD,
    WEIGHT_GRAD,
    Pass,
    Schedule,
)

PassSeconds = Callable[[int, Pass], float]
"""Seconds of a pass on a stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRun:
    """The timeline of one step, and which task is which pass: `(stage, position)` -> task."""

    schedule: Schedule
    timeline: Timeline
    task_of: dict[tuple[int, int], int]

    @property
    def seconds(self) -> float:
        """Of the whole pipeline, from the first forward to the last backward pass."""
        return self.timeline.seconds

    def idle_s(self, stage: int) -> float:
        """Seconds that a stage does not compute."""
        own = [i for (s, _), i in self.task_of.items() if s == stage]
        line = self.timeline
        return max(line.seconds - float((line.end_s[own] - line.start_s[own]).sum()), 0.0)

    @property
    def bubble_frac(self) -> float:
        """Idle share of all stages' time."""
        stages = range(self.schedule.num_stages)
        return sum(self.idle_s(s) for s in stages) / (len(stages) * self.seconds)


def in_flight(plan: Schedule, stage: int) -> int:
    """Most micro-batch chunks that a stage holds between forward and last backward pass."""
    held = most = 0
    for p in plan.passes[stage]:
        held += p.kind in (FORWARD, BOTH)
        most = max(most, held)
        held -= p.kind in (BACKWARD, BOTH, WEIGHT_GRAD)
    return most


def run_pipeline(plan: Schedule, seconds: PassSeconds, send_s: float = 0.0) -> PipelineRun:
    """Every pass where the schedule puts it; `send_s` for what one part hands to the next.

    >>> from simulator.schedule import schedule
    >>> plan = schedule("1f1b", num_stages=4, num_micro_batches=8)
    >>> run_pipeline(plan, lambda stage, p: 1.0 if p.kind == "F" else 2.0).seconds
    33.0
    """
    tasks: list[Task] = []
    task_of: dict[tuple[int, int], int] = {}
    done: dict[tuple[str, int, int], int] = {}
    waiting = in_order(plan)
    for stage, position, p in waiting:
        after = []
        for key, sender in needs(plan, stage, p):
            cause = done[key]
            if sender != stage and send_s > 0:
                link = f"link {sender}-{stage}"
                tasks.append(
                    Task(name=f"send {key[0]}{key[2]}", stream=link, seconds=send_s,
                         after=(cause,), kind="send")
                )  # fmt: skip
                cause = len(tasks) - 1
            after.append(cause)
        task_of[stage, position] = len(tasks)
        for key in gives(plan, stage, p):
            done[key] = len(tasks)
        tasks.append(
            Task(name=pass_name(p), stream=f"stage {stage}", seconds=seconds(stage, p),
                 after=tuple(after), kind=p.kind)
        )  # fmt: skip
    return PipelineRun(schedule=plan, timeline=run(tasks), task_of=task_of)


def in_order(plan: Schedule) -> Iterator[tuple[int, int, Pass]]:
    """(stage, position, pass) so that everything a pass needs comes before it."""
    at = [0] * plan.num_stages
    given: set[tuple[str, int, int]] = set()
    left = sum(len(own) for own in plan.passes)
    while left:
        before = left
        for stage, own in enumerate(plan.passes):
            while at[stage] < len(own):
                p = own[at[stage]]
                if not all(key in given for key, _ in needs(plan, stage, p)):
                    break
                yield stage, at[stage], p
                given.update(gives(plan, stage, p))
                at[stage] += 1
                left -= 1
        if left == before:
            raise InputError(f"schedule {plan.name}: its passes wait for one another in a circle")


def _halves(p: Pass) -> Iterator[tuple[str, int, int]]:
    """(forward or backward or weights, micro-batch, chunk) of the passes that `p` is made of."""
    if p.kind == BOTH:
        assert p.second is not None
        yield FORWARD, p.micro_batch, p.chunk
        yield BACKWARD, *p.second
    else:
        kind = INPUT_GRAD if p.kind == BACKWARD else p.kind
        yield BACKWARD if kind == INPUT_GRAD else kind, p.micro_batch, p.chunk


def needs(plan: Schedule, stage: int, p: Pass) -> Iterator[tuple[tuple[str, int, int], int]]:
    """(what, part, micro-batch) a pass waits for, and the stage that has it."""
    for kind, micro, chunk in _halves(p):
        part = plan.parts[chunk][stage]
        if kind == FORWARD and part:
            yield (FORWARD, part - 1, micro), _stage_of(plan, part - 1, chunk)
        elif kind == BACKWARD:
            yield (FORWARD, part, micro), stage
            if part < plan.num_parts - 1:
                yield (BACKWARD, part + 1, micro), _stage_of(plan, part + 1, chunk)
        elif kind == WEIGHT_GRAD:
            yield (BACKWARD, part, micro), stage


def gives(plan: Schedule, stage: int, p: Pass) -> Iterator[tuple[str, int, int]]:
    """(what, part, micro-batch) that a pass makes."""
    for kind, micro, chunk in _halves(p):
        yield kind, plan.parts[chunk][stage], micro


def _stage_of(plan: Schedule, part: int, chunk: int) -> int:
    """The stage that holds a part; of the same direction where there are two."""
    for own in (plan.parts[chunk], *plan.parts):
        if part in own:
            return own.index(part)
    raise InputError(f"schedule {plan.name}: no stage holds part {part}")


def pass_name(p: Pass) -> str:
    """'F3', 'B3.1' in chunk 1, 'F3&BW0' for two at once."""
    chunk = f".{p.chunk}" if p.chunk else ""
    second = f"&BW{p.second[0]}" if p.second else ""
    kind = FORWARD if p.kind == BOTH else p.kind
    return f"{kind}{p.micro_batch}{chunk}{second}"

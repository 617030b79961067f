"""Bytes of a stage over the seconds of a simulated step.

The timeline of the step (`simulator.timeline`) says when a pass runs, that of the memory
(`simulator.memory_timeline`) what it allocates and frees. A pass is one point: the most bytes alive
while it runs, and what is left when it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.memory_timeline import Timeline, stage_timeline
from simulator.recipe import Recipe
from simulator.timeline import StepTimeline
from workloads.models.transformer import TrainStep


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """One rank of a stage: at `when_s[i]` its live bytes become `live_bytes[i]`."""

    stage: int
    memory: Timeline
    when_s: NDArray[np.float64]
    live_bytes: NDArray[np.float64]

    @property
    def peak_bytes(self) -> float:
        """Most bytes alive at once."""
        return self.memory.peak_bytes


def stage_memory(
    found: StepTimeline, step: TrainStep, *, recipe: Recipe, stage: int
) -> StageMemory:
    """Memory of one rank of the stage while the step runs."""
    memory = stage_timeline(
        step, plan=found.plan, recipe=recipe, schedule=found.schedule, stage=stage,
        stage_layers=found.stage_layers,
    )  # fmt: skip
    own = [p for p in found.passes if p.stage == stage]
    starts, ends = found.timeline.start_s, found.timeline.end_s
    points = [
        point
        for one, (during, after) in zip(own, memory.by_pass(), strict=True)
        for point in ((float(starts[one.first]), during), (float(ends[one.last]), after))
    ]
    when, live = np.asarray(points, dtype=np.float64).T
    return StageMemory(stage=stage, memory=memory, when_s=when, live_bytes=live)


def all_stages(found: StepTimeline, step: TrainStep, *, recipe: Recipe) -> Iterator[StageMemory]:
    """Every stage in turn."""
    for stage in range(found.schedule.num_stages):
        yield stage_memory(found, step, recipe=recipe, stage=stage)


def fullest(stages: Sequence[StageMemory]) -> StageMemory:
    """The stage with the largest peak; the first of several."""
    return max(stages, key=lambda s: s.peak_bytes)


def outer_stages(
    found: StepTimeline, step: TrainStep, *, recipe: Recipe
) -> tuple[StageMemory, ...]:
    """The first stage, which has most micro-batches in flight, and the last, which has the head.

    Where another stage holds more layers than the first, the fullest of all is there too.
    """
    last = found.schedule.num_stages - 1
    outer = {0, last}
    if max(found.stage_layers) > found.stage_layers[0]:
        every = tuple(all_stages(found, step, recipe=recipe))
        return tuple(every[s] for s in sorted({*outer, fullest(every).stage}))
    return tuple(stage_memory(found, step, recipe=recipe, stage=s) for s in sorted(outer))

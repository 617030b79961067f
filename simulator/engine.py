"""Discrete events: tasks in order on streams, sharing resources. It knows no GPUs.

A task starts when the one before it on its stream has ended and so has every task it waits for.
Alone it takes `seconds`. While it runs it takes a share of some resources; where the shares of all
that run add up to more than there is, those that use it are slowed (processor sharing):

    rate_i = min(1, 1 / max over r in uses_i of the sum of all running shares of r)

So no resource is ever overdrawn, no task is faster than alone, and since no share exceeds one,
n tasks together never take longer than one after another. Events are ordered by one tuple,
(time, task, version); an event whose version is old belongs to a rate that changed, and is skipped.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError
from hwmodels.frozen import FrozenDict

NONE = -1
"""In place of a task: nothing came before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Work on a stream; `after` are positions of other tasks in the list that is run.

    `seconds` is its time alone, `uses` the share of each resource it then takes, in [0, 1].
    """

    name: str
    stream: str
    seconds: float
    after: tuple[int, ...] = ()
    uses: Mapping[str, float] = field(default_factory=FrozenDict)
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.seconds >= 0:
            raise InputError(f"task {self.name}: {self.seconds} seconds; give 0 or more")
        for resource, share in self.uses.items():
            if not 0 <= share <= 1:
                raise InputError(
                    f"task {self.name}: uses {share} of {resource}; give a share in [0, 1]"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When each task ran: `start_s` and `end_s` by position, and what it waited for last.

    `cause[i]` is the task whose end let task i start, `NONE` for one that waited for none.
    """

    tasks: tuple[Task, ...]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    cause: NDArray[np.int64]

    @property
    def seconds(self) -> float:
        """From the start to the end of the last task."""
        return float(self.end_s.max()) if len(self.tasks) else 0.0

    @property
    def slowed_s(self) -> NDArray[np.float64]:
        """Seconds that sharing added to each task."""
        alone = np.fromiter((t.seconds for t in self.tasks), dtype=np.float64)
        return self.end_s - self.start_s - alone

    def critical_path(self) -> tuple[int, ...]:
        """Tasks each of which let the next one start, up to the one that ends last."""
        if not self.tasks:
            return ()
        path = [int(self.end_s.argmax())]
        while self.cause[path[-1]] != NONE:
            path.append(int(self.cause[path[-1]]))
        return tuple(reversed(path))

    def busy(self, streams: Sequence[str]) -> NDArray[np.float64]:
        """Disjoint intervals [n, 2] in which any of the streams runs something."""
        wanted = set(streams)
        chosen = [i for i, t in enumerate(self.tasks) if t.stream in wanted and t.seconds > 0]
        return union(np.column_stack((self.start_s[chosen], self.end_s[chosen])))

    def exposed_s(self, streams: Sequence[str], under: Sequence[str]) -> float:
        """Seconds in which `streams` are busy while nothing runs on any stream of `under`."""
        asked, hiding = self.busy(streams), self.busy(under)
        both = union(np.concatenate((asked, hiding)))
        return total_s(both) - total_s(hiding)


def union(intervals: NDArray[np.float64]) -> NDArray[np.float64]:
    """The intervals [n, 2] merged where they touch, in order.

    >>> union(np.asarray([[2.0, 3.0], [0.0, 1.0], [0.5, 2.0], [4.0, 5.0]])).tolist()
    [[0.0, 3.0], [4.0, 5.0]]
    """
    if not len(intervals):
        return np.zeros((0, 2))
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reached = np.maximum.accumulate(ordered[:, 1])
    first = np.concatenate(([True], ordered[1:, 0] > reached[:-1]))
    last = np.concatenate((first[1:], [True]))
    return np.column_stack((ordered[first, 0], reached[last]))


def total_s(intervals: NDArray[np.float64]) -> float:
    """Seconds that disjoint intervals [n, 2] cover."""
    return float((intervals[:, 1] - intervals[:, 0]).sum())


def run(tasks: Sequence[Task]) -> Timeline:
    """Every task from the first start to the last end.

    Raises `InputError` where tasks wait for one another in a circle.

    >>> half = {"link": 0.75}
    >>> done = run([Task(name="a", stream="x", seconds=1.0, uses=half),
    ...             Task(name="b", stream="y", seconds=1.0, uses=half),
    ...             Task(name="c", stream="x", seconds=1.0, after=(1,))])
    >>> done.end_s.tolist(), done.critical_path()
    ([1.5, 1.5, 2.5], (1, 2))
    """
    return _Run(tuple(tasks)).timeline()


class _Run:
    """State while the events are worked through; used once."""

    def __init__(self, tasks: tuple[Task, ...]) -> None:
        n = len(tasks)
        self.tasks = tasks
        self.waits, self.next = _waits(tasks)
        self.left = [t.seconds for t in tasks]
        self.rate, self.since, self.version = [1.0] * n, [0.0] * n, [0] * n
        self.start, self.end, self.cause = [0.0] * n, [0.0] * n, [NONE] * n
        self.users: dict[str, dict[int, float]] = {}
        self.events: list[tuple[float, int, int]] = []

    def timeline(self) -> Timeline:
        """Work through all events."""
        for i, waits in enumerate(self.waits):
            if waits == 0:
                self._begin(i, 0.0)
        num_done = 0
        while self.events:
            now, i, version = heapq.heappop(self.events)
            if version != self.version[i]:
                continue
            num_done += 1
            self._finish(i, now)
        if num_done < len(self.tasks):
            stuck = [t.name for t, waits in zip(self.tasks, self.waits, strict=True) if waits]
            raise InputError(f"tasks wait for one another in a circle: {', '.join(stuck[:8])}")
        return Timeline(
            tasks=self.tasks,
            start_s=np.asarray(self.start, dtype=np.float64),
            end_s=np.asarray(self.end, dtype=np.float64),
            cause=np.asarray(self.cause, dtype=np.int64),
        )

    def _begin(self, i: int, now: float) -> None:
        self.start[i] = self.since[i] = now
        uses = self.tasks[i].uses
        for resource, share in uses.items():
            self.users.setdefault(resource, {})[i] = share
        self._pace(i, now)
        if uses:
            self._repace(i, now)

    def _finish(self, i: int, now: float) -> None:
        self.end[i] = now
        self.version[i] += 1
        uses = self.tasks[i].uses
        for resource in uses:
            del self.users[resource][i]
        if uses:
            self._repace(i, now)
        for j in self.next[i]:
            self.waits[j] -= 1
            if self.waits[j] == 0:
                self.cause[j] = i
                self._begin(j, now)

    def _repace(self, i: int, now: float) -> None:
        """New rates for the others that use what task i uses."""
        others = {j for resource in self.tasks[i].uses for j in self.users[resource]} - {i}
        for j in sorted(others):
            self._pace(j, now)

    def _pace(self, i: int, now: float) -> None:
        """The task's rate from now on, and the event of its end."""
        wanted = max((sum(self.users[r].values()) for r in self.tasks[i].uses), default=0.0)
        rate = 1.0 if wanted <= 1 else 1 / wanted
        if rate == self.rate[i] and self.version[i]:
            return
        self.left[i] = max(self.left[i] - (now - self.since[i]) * self.rate[i], 0.0)
        self.since[i], self.rate[i] = now, rate
        self.version[i] += 1
        heapq.heappush(self.events, (now + self.left[i] / rate, i, self.version[i]))


def _waits(tasks: tuple[Task, ...]) -> tuple[list[int], list[list[int]]]:
    """For how many others each task waits, and which wait for it."""
    waits: list[int] = []
    following: list[list[int]] = [[] for _ in tasks]
    before: dict[str, int] = {}
    for i, task in enumerate(tasks):
        causes = {j for j in task.after if _known(tasks, j, task)}
        if task.stream in before:
            causes.add(before[task.stream])
        before[task.stream] = i
        waits.append(len(causes))
        for j in causes:
            following[j].append(i)
    return waits, following


def _known(tasks: tuple[Task, ...], position: int, task: Task) -> bool:
    if not 0 <= position < len(tasks):
        raise InputError(f"task {task.name} waits for task {position} of {len(tasks)}")
    return True

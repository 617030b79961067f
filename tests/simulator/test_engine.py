"""The engine: order, sharing, conservation, limits; over random graphs of tasks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError
from simulator.engine import NONE, Task, Timeline, run, total_s, union

RESOURCES = ("hbm", "link", "sm")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Task, ...]:
    tasks = []
    for i in range(draw(st.integers(1, 14))):
        uses = draw(st.dictionaries(st.sampled_from(RESOURCES), st.floats(0, 1), max_size=3))
        tasks.append(
            Task(
                name=f"t{i}",
                stream=draw(st.sampled_from(("a", "b", "c", "d"))),
                seconds=draw(st.one_of(st.just(0.0), st.floats(1e-6, 10))),
                after=tuple(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else (),
                uses=uses,
            )
        )
    return tuple(tasks)


def longest_path(tasks: tuple[Task, ...]) -> float:
    """The end of the last task if nothing were shared."""
    end: list[float] = []
    on_stream: dict[str, float] = {}
    for t in tasks:
        start = max([on_stream.get(t.stream, 0.0), *(end[j] for j in t.after)])
        end.append(start + t.seconds)
        on_stream[t.stream] = end[-1]
    return max(end)


def used(tasks: tuple[Task, ...], resource: str) -> float:
    return sum(t.seconds * t.uses.get(resource, 0.0) for t in tasks)


@settings(max_examples=300)
@given(graphs())
def test_between_the_longest_path_and_one_after_another(tasks: tuple[Task, ...]) -> None:
    done = run(tasks)
    serial = sum(t.seconds for t in tasks)
    least = max([longest_path(tasks), *(used(tasks, r) for r in RESOURCES)])
    assert least <= done.seconds * (1 + 1e-9) + 1e-12
    assert done.seconds <= serial * (1 + 1e-9) + 1e-12


@settings(max_examples=300)
@given(graphs())
def test_streams_keep_their_order_and_waits_are_kept(tasks: tuple[Task, ...]) -> None:
    done = run(tasks)
    for i, t in enumerate(tasks):
        assert all(done.end_s[j] <= done.start_s[i] for j in t.after)
    for stream in {t.stream for t in tasks}:
        own = [i for i, t in enumerate(tasks) if t.stream == stream]
        assert all(done.end_s[i] <= done.start_s[j] for i, j in pairwise(own))
    assert np.all(done.slowed_s >= -1e-9)


@settings(max_examples=200)
@given(graphs())
def test_no_resource_is_overdrawn(tasks: tuple[Task, ...]) -> None:
    """Work done in any interval between events fits into what there is."""
    done = run(tasks)
    for r in RESOURCES:
        for a, b in pairwise(np.unique(np.concatenate((done.start_s, done.end_s)))):
            running = [i for i in range(len(tasks)) if done.start_s[i] <= a and done.end_s[i] >= b]
            alone = [i for i in running if done.slowed_s[i] < 1e-12]
            assert sum(tasks[i].uses.get(r, 0.0) for i in alone) <= 1 + 1e-6 or b - a < 1e-9
        assert used(tasks, r) <= done.seconds * (1 + 1e-9) + 1e-12


@settings(max_examples=200)
@given(graphs())
def test_the_critical_path_leads_from_the_start_without_a_gap(tasks: tuple[Task, ...]) -> None:
    done = run(tasks)
    path = done.critical_path()
    assert done.start_s[path[0]] == 0 and done.cause[path[0]] == NONE
    assert done.end_s[path[-1]] == done.seconds
    assert all(done.end_s[i] == done.start_s[j] for i, j in pairwise(path))


def test_two_that_want_three_quarters_each_share_by_hand() -> None:
    """Together at 2/3 until b has done its 1 at 1.5; a's other 1 then runs alone."""
    uses = {"hbm": 0.75}
    a = Task(name="a", stream="x", seconds=2.0, uses=uses)
    done = run([a, Task(name="b", stream="y", seconds=1.0, uses=uses)])
    assert done.end_s.tolist() == pytest.approx([2.5, 1.5])
    assert done.slowed_s.tolist() == pytest.approx([0.5, 0.5])


def test_what_shares_nothing_is_not_slowed() -> None:
    tasks = [Task(name=r, stream=r, seconds=1.0, uses={r: 1.0}) for r in RESOURCES]
    assert run(tasks).seconds == 1.0


def test_exposed_is_what_nothing_hides() -> None:
    tasks = [
        Task(name="compute", stream="sm", seconds=2.0),
        Task(name="hidden", stream="nic", seconds=1.5),
        Task(name="half", stream="nic", seconds=1.0),
    ]
    assert run(tasks).exposed_s(["nic"], ["sm"]) == pytest.approx(0.5)


def test_a_circle_is_named() -> None:
    circle = [
        Task(name="head", stream="a", seconds=1.0, after=(1,)),
        Task(name="tail", stream="b", seconds=1.0, after=(0,)),
    ]
    with pytest.raises(InputError, match="in a circle: head, tail"):
        run(circle)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seconds": -1.0}, "give 0 or more"),
        ({"seconds": float("nan")}, "give 0 or more"),
        ({"seconds": 1.0, "uses": {"hbm": 1.5}}, r"a share in \[0, 1\]"),
    ],
)
def test_impossible_tasks_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Task(name="t", stream="a", **fields)  # type: ignore[arg-type]


def test_a_wait_for_nothing_that_exists_is_refused() -> None:
    with pytest.raises(InputError, match="waits for task 3 of 1"):
        run([Task(name="t", stream="a", seconds=1.0, after=(3,))])


def test_nothing_takes_no_time() -> None:
    done = run([])
    assert isinstance(done, Timeline) and done.seconds == 0 and done.critical_path() == ()
    assert total_s(union(np.zeros((0, 2)))) == 0

"""Schedules: every pass once and in a possible order, bubbles as published, memory as published."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError, UnknownNameError
from simulator.pipeline import PassSeconds, PipelineRun, in_flight, run_pipeline
from simulator.schedule import (
    BACKWARD,
    BOTH,
    DUALPIPE,
    FORWARD,
    GPIPE,
    INPUT_GRAD,
    INTERLEAVED,
    ONE_F_ONE_B,
    SCHEDULES,
    WEIGHT_GRAD,
    ZERO_BUBBLE,
    Pass,
    Schedule,
    schedule,
)

TIMES = st.floats(0.1, 10)


def equal_stages(f: float, b: float, w: float, together: float | None = None) -> PassSeconds:
    both = f + b + w if together is None else together
    seconds = {FORWARD: f, INPUT_GRAD: b, WEIGHT_GRAD: w, BACKWARD: b + w, BOTH: both}
    return lambda stage, p: seconds[p.kind]


@st.composite
def shapes(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(SCHEDULES))
    stages = draw(st.integers(1, 6))
    if name == DUALPIPE:
        stages = 2 * draw(st.integers(1, 3))
        return schedule(
            name, num_stages=stages, num_micro_batches=2 * stages + 2 * draw(st.integers(0, 4))
        )
    chunks = draw(st.integers(1, 4)) if name == INTERLEAVED else 1
    micro = stages * draw(st.integers(1, 4)) if chunks > 1 else draw(st.integers(1, 12))
    return schedule(name, num_stages=stages, num_micro_batches=micro, num_chunks=chunks)


@settings(max_examples=200)
@given(shapes())
def test_every_micro_batch_passes_every_part_once_each_way(plan: Schedule) -> None:
    for stage, own in enumerate(plan.passes):
        seen: Counter[tuple[str, int, int]] = Counter()
        for p in own:
            kinds = [BACKWARD] if p.kind in (BACKWARD, INPUT_GRAD) else [p.kind]
            if p.kind == BOTH:
                assert p.second is not None
                seen[BACKWARD, p.second[0], plan.parts[p.second[1]][stage]] += 1
                kinds = [FORWARD]
            for kind in kinds:
                seen[kind, p.micro_batch, plan.parts[p.chunk][stage]] += 1
        assert set(seen.values()) == {1}
        split = sum(kind == WEIGHT_GRAD for kind, _, _ in seen)
        assert split == sum(p.kind == INPUT_GRAD for p in own)
        forward = sum(kind == FORWARD for kind, _, _ in seen)
        assert forward == sum(kind == BACKWARD for kind, _, _ in seen)
        direct = plan.num_micro_batches * (len(plan.parts) if plan.name != DUALPIPE else 1)
        assert forward == direct


@settings(max_examples=200)
@given(shapes(), TIMES, TIMES, TIMES, st.floats(0, 3))
def test_between_the_busiest_stage_and_one_pass_after_another(
    plan: Schedule, f: float, b: float, w: float, send: float
) -> None:
    done = run_pipeline(plan, equal_stages(f, b, w), send)
    tasks = done.timeline.tasks
    busiest = max(
        sum(t.seconds for t in tasks if t.stream == f"stage {s}") for s in range(plan.num_stages)
    )
    assert busiest <= done.seconds * (1 + 1e-9)
    assert done.seconds <= sum(t.seconds for t in tasks) * (1 + 1e-9)
    assert 0 <= done.bubble_frac < 1


def idle(name: str, p: int, m: int, seconds: PassSeconds, v: int = 1) -> PipelineRun:
    plan = schedule(name, num_stages=p, num_micro_batches=m, num_chunks=v)
    return run_pipeline(plan, seconds)


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(0, 9), TIMES, TIMES, TIMES)
def test_bubbles_of_gpipe_and_1f1b(p: int, more: int, f: float, b: float, w: float) -> None:
    for name in (GPIPE, ONE_F_ONE_B):
        done = idle(name, p, p + more, equal_stages(f, b, w))
        assert done.idle_s(0) == pytest.approx((p - 1) * (f + b + w), abs=1e-9)
        expected = (p - 1) / (p + more + p - 1)
        assert done.bubble_frac == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), TIMES, TIMES)
def test_the_bubble_of_interleaved_chunks(p: int, groups: int, v: int, f: float, b: float) -> None:
    done = idle(INTERLEAVED, p, p * groups, equal_stages(f / v, b / v, 0.0), v)
    assert done.idle_s(0) == pytest.approx((p - 1) * (f + b) / v, abs=1e-9)


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(0, 9), TIMES, TIMES, st.floats(0, 1))
def test_the_bubble_of_split_backward_passes(
    p: int, more: int, f: float, b: float, share: float
) -> None:
    w = share * min(f, b)
    done = idle(ZERO_BUBBLE, p, p + more, equal_stages(f, b, w))
    assert done.idle_s(0) == pytest.approx((p - 1) * (f + b - w), abs=1e-9)


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(0, 5), TIMES, st.floats(0, 1), st.floats(0.5, 1))
def test_the_bubble_of_dualpipe(
    half: int, more: int, f: float, share: float, overlap: float
) -> None:
    """F = B, W no longer, and the pair of passes together no shorter than its longer one."""
    p, w = 2 * half, share * f
    together = max(overlap * (2 * f + w), f + w)
    done = idle(DUALPIPE, p, 2 * p + 2 * more, equal_stages(f, f, w, together))
    assert done.idle_s(half - 1) == pytest.approx((half - 1) * (together + f - 2 * w), abs=1e-9)


@pytest.mark.parametrize(("p", "m", "v"), [(4, 8, 1), (4, 8, 2), (8, 16, 4), (2, 6, 3)])
def test_chunks_in_flight_as_published(p: int, m: int, v: int) -> None:
    """1F1B: p - s; interleaved: 2 (p - s - 1) + (v - 1) p + 1."""
    name = INTERLEAVED if v > 1 else ONE_F_ONE_B
    done = idle(name, p, m, equal_stages(1, 1, 1), v)
    for s in range(p):
        expected = 2 * (p - s - 1) + (v - 1) * p + 1 if v > 1 else p - s
        assert in_flight(done.schedule, s) == min(expected, m * v)


def test_split_backward_passes_hold_no_more_than_1f1b_does() -> None:
    done = idle(ZERO_BUBBLE, 6, 18, equal_stages(1, 1, 1))
    assert max(in_flight(done.schedule, s) for s in range(6)) == 6


def test_dualpipe_holds_one_more_than_the_stages() -> None:
    done = idle(DUALPIPE, 8, 20, equal_stages(1, 1, 1))
    assert max(in_flight(done.schedule, s) for s in range(8)) == 9


def test_sends_lie_between_the_stages() -> None:
    """Two stages, one micro-batch: forward, send, forward, backward, send, backward."""
    plan = schedule(ONE_F_ONE_B, num_stages=2, num_micro_batches=1)
    done = run_pipeline(plan, equal_stages(1, 1, 1), send_s=0.25)
    assert done.seconds == pytest.approx(2 * (1 + 2) + 2 * 0.25)
    assert [t.name for t in done.timeline.tasks if t.kind == "send"] == ["send F0", "send BW0"]


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        (INTERLEAVED, {"num_stages": 4, "num_micro_batches": 6, "num_chunks": 2}, "no multiple"),
        (DUALPIPE, {"num_stages": 3, "num_micro_batches": 12}, "even number of stages"),
        (DUALPIPE, {"num_stages": 4, "num_micro_batches": 6}, "at least twice"),
        (GPIPE, {"num_stages": 4, "num_micro_batches": 6, "num_chunks": 2}, "one chunk a stage"),
        (GPIPE, {"num_stages": 0, "num_micro_batches": 6}, "0 stages; give at least 1"),
    ],
)
def test_impossible_numbers_are_refused(name: str, fields: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        schedule(name, **fields)


def test_unknown_schedules_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean"):
        schedule("1f2b", num_stages=2, num_micro_batches=2)


def test_passes_that_wait_for_each_other_are_refused() -> None:
    wrong = Schedule(
        name="wrong",
        passes=((Pass(BACKWARD, 0), Pass(FORWARD, 0)),),
        num_micro_batches=1,
        parts=((0,),),
    )
    with pytest.raises(InputError, match="in a circle"):
        run_pipeline(wrong, equal_stages(1, 1, 1))

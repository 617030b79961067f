"""Mamba's selective scan, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels import checking
from validate.kernels.judge import relative_error
from validate.kernels.selective_scan import kernel
from validate.kernels.selective_scan.suite import SPECS, _case, _inputs, _reference
from validate.kernels.spec import Launch
from validate.record import Case

(SPEC,) = SPECS
TILE = Launch(meta={"BLOCK": 32, "CUT": 1}, num_warps=1)


def _errors(case: Case, launch: Launch, len_segment: int | None = None, seed: int = 0) -> float:
    inputs = _inputs(case, torch.Generator().manual_seed(seed), checking.CPU)
    outs = kernel.SelectiveScan(dict(inputs), launch, len_segment)()
    truths = _reference(case, inputs)
    return max(relative_error(out, ref) for out, ref in zip(outs, truths, strict=True))


@pytest.mark.parametrize("case", SPEC.checks, ids=lambda case: case.key)
def test_checks(case: Case) -> None:
    checking.check(SPEC, case)


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda launch: launch.label)
def test_every_shipped_tile(launch: Launch) -> None:
    case = _case("fp32", 1, 12, launch.meta["BLOCK"] + 3)
    assert _errors(case, launch, 5 if launch.meta["CUT"] else None) < 1e-5


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 24),
    channels=st.integers(1, 40),
    states=st.integers(1, 17),
    segment=st.integers(1, 24),
    seed=st.integers(0, 9),
)
def test_ragged_shapes_in_any_segments(
    batch: int, length: int, channels: int, states: int, segment: int, seed: int
) -> None:
    case = _case("fp32", batch, length, channels, states)
    assert _errors(case, TILE, segment, seed) < 1e-5


def test_segments_fill_a_gpu_and_cover_the_sequence() -> None:
    launch = kernel.LAUNCHES[0]
    segment = kernel.len_segments(1, 8192, 4096, launch)
    assert 8192 // segment * 4096 >= kernel.LANES_WANTED // 2
    assert segment * -(-8192 // segment) >= 8192
    assert kernel.len_segments(64, 2048, 8192, launch) == 2048
    assert kernel.len_segments(1, 10, 1, launch) == 10


def test_channels_left_out_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = kernel.SelectiveScan(
        dict(_inputs(_case("fp32", 1, 3, 70), torch.Generator(), checking.CPU)), TILE
    )
    scan.blocks -= 1
    assert not bool(torch.isfinite(scan()[0]).all())


def test_a_state_not_handed_on_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets:
        def __getitem__(self, grid: object) -> object:
            return lambda a, end, sums, start, *sizes, **tile: start.zero_()

    monkeypatch.setattr(kernel, "hand_on", Forgets())
    assert _errors(_case("fp32", 1, 12, 8), TILE, 4) > 1e-3


def test_large_steps_pass_through_softplus() -> None:
    case = _case("fp32", 1, 4, 8)
    inputs = dict(_inputs(case, torch.Generator().manual_seed(1), checking.CPU))
    inputs["delta"] = inputs["delta"] * 40
    outs = kernel.SelectiveScan(inputs, TILE)()
    assert relative_error(outs[0], _reference(case, inputs)[0]) < 1e-5


def test_every_timed_case_is_counted_and_every_binary_has_a_name_of_its_own() -> None:
    for spec in SPECS:
        assert all(spec.op(case).work(164 * 2**10).bytes > 0 for case in spec.grid)
        assert len({case.key for case in spec.grid}) == len(spec.grid)
    names = [binary.name for spec in SPECS for binary in spec.compilations()]
    assert len(set(names)) == len(names)

"""Mamba-2's scan in chunks, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels import checking
from validate.kernels.judge import relative_error
from validate.kernels.spec import Inputs, Launch
from validate.kernels.ssd_scan import kernel
from validate.kernels.ssd_scan.suite import SPECS, _case, _inputs, _reference, _row
from validate.measurement import SIZES
from validate.record import Case

(SPEC,) = SPECS
SMALL = kernel.LAUNCHES[-1]


def _made(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(_inputs(case, torch.Generator().manual_seed(seed), checking.CPU))


def _errors(case: Case, inputs: Inputs, launch: Launch = SMALL) -> float:
    outs = kernel.SsdScan(inputs, case.dtype, launch)()
    truths = _reference(case, inputs)
    return max(relative_error(out, ref) for out, ref in zip(outs, truths, strict=True))


@pytest.mark.parametrize("case", SPEC.checks, ids=lambda case: case.key)
def test_checks(case: Case) -> None:
    checking.check(SPEC, case)


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda launch: launch.label)
def test_every_shipped_tile(launch: Launch) -> None:
    case = _case("fp32", 1, launch.meta["CHUNK"] + 5, 1, 1, launch.meta["BP"] + 3, 16)
    assert _errors(case, _made(case), launch) < 1e-4


@settings(max_examples=5, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 100),
    groups=st.integers(1, 2),
    share=st.integers(1, 2),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 9),
)
def test_ragged_shapes(
    batch: int, length: int, groups: int, share: int, widths: tuple[int, int], seed: int
) -> None:
    case = _case("fp32", batch, length, groups * share, groups, *widths)
    assert _errors(case, _made(case, seed)) < 1e-4


def test_heads_that_forget_at_once_overflow_nowhere() -> None:
    case = _case("fp32", 1, 70, 1, 1, 16, 16)
    inputs = _made(case)
    inputs["dt"] = inputs["dt"] * 30
    assert _errors(case, inputs) < 1e-4


@pytest.mark.parametrize("method", ["run_states", "run_outputs"])
def test_a_launch_left_out_is_caught(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(kernel.SsdScan, method, lambda self: None)
    case = _case("fp32", 1, 20, 1, 1, 16, 16)
    assert _errors(case, _made(case)) == float("inf")


def test_states_not_handed_on_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernel.SsdScan.run_states

    def cleared(self: kernel.SsdScan) -> None:
        run(self)
        self.before.zero_()

    monkeypatch.setattr(kernel.SsdScan, "run_states", cleared)
    case = _case("fp32", 1, 80, 1, 1, 16, 16)
    inputs = _made(case)
    inputs["a"] = inputs["a"] / 20
    assert _errors(case, inputs) > 1e-2


def test_a_record_is_named_as_public_rows_are() -> None:
    family, op, params = _row(SPEC.grid[0])
    assert family == "scan_conv1d"
    assert set(SIZES[op]) <= set(params)


def test_every_timed_case_is_counted_and_every_binary_has_a_name_of_its_own() -> None:
    for spec in SPECS:
        assert all(spec.op(case).work(164 * 2**10).bytes > 0 for case in spec.grid)
        assert len({case.key for case in spec.grid}) == len(spec.grid)
    names = [binary.name for spec in SPECS for binary in spec.compilations()]
    assert len(set(names)) == len(names)

"""The delta rule in chunks, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels import checking
from validate.kernels.delta_rule import kernel
from validate.kernels.delta_rule.suite import SPECS, _case, _inputs, _reference, _row
from validate.kernels.judge import relative_error
from validate.kernels.spec import Inputs, Launch
from validate.measurement import SIZES
from validate.record import Case

(SPEC,) = SPECS
SMALL = kernel.LAUNCHES[-1]


def _made(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(_inputs(case, torch.Generator().manual_seed(seed), checking.CPU))


def _errors(case: Case, inputs: Inputs, launch: Launch = SMALL) -> float:
    outs = kernel.DeltaRule(inputs, case.params["decay"], case.dtype, launch)()
    truths = _reference(case, inputs)
    return max(relative_error(out, ref) for out, ref in zip(outs, truths, strict=True))


@pytest.mark.parametrize("case", SPEC.checks, ids=lambda case: case.key)
def test_checks(case: Case) -> None:
    checking.check(SPEC, case)


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda launch: launch.label)
def test_every_shipped_tile(launch: Launch) -> None:
    case = _case("fp32", "scalar", (1, launch.meta["CHUNK"] + 3, 1, 1, 17, launch.meta["BV"] + 1))
    assert _errors(case, _made(case), launch) < 1e-4


@settings(max_examples=5, deadline=None)
@given(
    decay=st.sampled_from(list(kernel.DECAYS)),
    length=st.integers(1, 80),
    heads=st.integers(1, 2),
    share=st.integers(1, 2),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 9),
)
def test_ragged_shapes(
    decay: str, length: int, heads: int, share: int, widths: tuple[int, int], seed: int
) -> None:
    case = _case("fp32", decay, (1, length, heads, heads * share, *widths))
    assert _errors(case, _made(case, seed)) < 1e-4


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda launch: launch.label)
def test_one_key_again_and_again_keeps_its_accuracy(launch: Launch) -> None:
    """Powers of the chunk's triangle would grow to 1e18 here; its blocks' inverses do not."""
    case = _case("fp32", "none", (1, 64, 1, 1, 16, 16))
    inputs = _made(case)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.ones_like(inputs["beta"])
    assert _errors(case, inputs, launch) < 1e-4


def test_decays_that_forget_at_once_overflow_nowhere() -> None:
    case = _case("fp32", "scalar", (1, 70, 1, 1, 16, 16))
    inputs = _made(case)
    inputs["g"][:, ::3] *= 300
    assert _errors(case, inputs) < 1e-4


@pytest.mark.parametrize("method", ["run_inverses", "run_pairs", "run_states", "run_outputs"])
def test_a_launch_left_out_is_caught(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(kernel.DeltaRule, method, lambda self: None)
    case = _case("fp32", "scalar", (1, 20, 1, 1, 16, 16))
    assert _errors(case, _made(case)) == float("inf")


def test_blocks_taken_as_independent_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernel.DeltaRule.run_inverses

    def plain(self: kernel.DeltaRule) -> None:
        run(self)
        self.inverses.copy_(torch.eye(kernel.SUB).repeat(4, 1)[None])

    monkeypatch.setattr(kernel.DeltaRule, "run_inverses", plain)
    case = _case("fp32", "none", (1, 64, 1, 1, 16, 16))
    assert _errors(case, _made(case)) > 1e-2


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

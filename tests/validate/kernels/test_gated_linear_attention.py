"""Chunked linear attention with decays and its gradients, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels import checking
from validate.kernels.gated_linear_attention import kernel, reference
from validate.kernels.gated_linear_attention.suite import (
    BACKWARD,
    FORWARD,
    SPECS,
    _case,
    _inputs,
    _reference,
)
from validate.kernels.judge import relative_error
from validate.kernels.spec import Inputs, KernelSpec, Launch
from validate.record import Case

CASES = [(spec, case) for spec in SPECS for case in spec.checks]
SMALL = kernel.LAUNCHES[-1]


def _made(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(_inputs(case, torch.Generator().manual_seed(seed), checking.CPU))


def _errors(case: Case, inputs: Inputs, launch: Launch = SMALL) -> list[float]:
    make = kernel.Backward if case.op == BACKWARD else kernel.Forward
    outs = make(inputs, case.params["decay"], case.dtype, launch)()
    return [relative_error(o, r) for o, r in zip(outs, _reference(case, inputs), strict=True)]


@pytest.mark.parametrize(("spec", "case"), CASES, ids=lambda x: getattr(x, "key", ""))
def test_checks(spec: KernelSpec, case: Case) -> None:
    checking.check(spec, case)


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda launch: launch.label)
@pytest.mark.parametrize("name", [FORWARD, BACKWARD])
def test_every_shipped_tile(name: str, launch: Launch) -> None:
    case = _case(name, "fp32", "channel", (1, launch.meta["CHUNK"] + 3, 1, 17, 18))
    assert max(_errors(case, _made(case), launch)) < 1e-4


@settings(max_examples=4, deadline=None)
@given(
    name=st.sampled_from([FORWARD, BACKWARD]),
    decay=st.sampled_from(list(kernel.DECAYS)),
    sizes=st.tuples(*(st.integers(1, top) for top in (2, 40, 2, 33, 40))),
    seed=st.integers(0, 9),
)
def test_ragged_shapes(name: str, decay: str, sizes: tuple[int, ...], seed: int) -> None:
    case = _case(name, "fp32", decay, sizes)
    assert max(_errors(case, _made(case, seed))) < 1e-4


@pytest.mark.parametrize("name", [FORWARD, BACKWARD])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_decays_that_forget_at_once_overflow_nowhere(name: str, decay: str) -> None:
    case = _case(name, "fp32", decay, (1, 40, 1, 16, 16))
    inputs = _made(case)
    rows = torch.arange(40) % 3 == 0
    inputs["g"][:, rows] *= 2000
    assert max(_errors(case, inputs)) < 1e-4


def test_heads_share_the_keys_of_their_group() -> None:
    case = _case(FORWARD, "fp32", "scalar", (1, 20, 4, 16, 16))
    inputs = _made(case)
    few = {
        **inputs,
        "q": inputs["q"][:, :, :2].contiguous(),
        "k": inputs["k"][:, :, :2].contiguous(),
    }
    whole = {**inputs, **{name: few[name].repeat_interleave(2, dim=2) for name in "qk"}}
    (out,) = kernel.Forward(few, "scalar", "fp32", SMALL)()
    assert relative_error(out, _reference(case, whole)[0]) < 1e-4


@pytest.mark.parametrize("method", ["run_scores", "run_states"])
def test_a_launch_left_out_is_caught(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(kernel.Forward, method, lambda self, *a, **k: None)
    case = _case(FORWARD, "fp32", "channel", (1, 20, 1, 16, 16))
    assert max(_errors(case, _made(case))) == float("inf")


def test_sums_that_do_not_cross_chunks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernel.Forward.run_states

    def cleared(
        self: kernel.Forward, k: object, v: object, states: torch.Tensor, **how: bool
    ) -> None:
        run(self, k, v, states, **how)
        states.zero_()

    monkeypatch.setattr(kernel.Forward, "run_states", cleared)
    case = _case(FORWARD, "fp32", "scalar", (1, 40, 1, 16, 16))
    assert max(_errors(case, _made(case))) > 1e-2


def test_every_timed_case_is_counted_and_every_binary_has_a_name_of_its_own() -> None:
    for spec in SPECS:
        assert all(spec.op(case).work(164 * 2**10).bytes > 0 for case in spec.grid)
        assert len({case.key for case in spec.grid}) == len(spec.grid)
    names = [binary.name for spec in SPECS for binary in spec.compilations()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_gradients_in_stretches_are_those_of_every_state(
    decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, 23, 2, 4), (1, 23, 2, 4), (1, 23, 2, 3), (1, 23, 2, 3)]
    q, k, v, do = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    sizes = {"none": None, "scalar": (1, 23, 2), "channel": (1, 23, 2, 4)}[decay]
    g = None if sizes is None else -torch.rand(sizes, generator=generator, dtype=torch.float64)
    truths = reference.gradients(q, k, v, g, do)
    monkeypatch.setattr(reference, "MOST_KEPT", 4)
    found = reference.gradients(q, k, v, g, do)
    assert len(found) == (3 if g is None else 4)
    assert max(relative_error(x, y) for x, y in zip(found, truths, strict=True)) < 1e-12

"""Fused recurrent layers: every step, state and head right, on every tile set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels.checking import check, errors
from validate.kernels.judge import relative_error
from validate.kernels.recurrent_step import kernel, reference, suite
from validate.kernels.spec import Launch
from validate.record import Case
from workloads.ops.fused_rnn import FusedRnn

SPEC = suite.SPEC
OTHERS = [
    (name, case)
    for name in ("cudnn", "torch")
    for case in SPEC.checks[::3]  # every cell, format and size
    if SPEC.implementation(name).refusal(case, 90) is None
]


def _key(value: object) -> str:
    return value.key if isinstance(value, Case) else str(value)


@pytest.mark.parametrize("case", SPEC.checks, ids=_key)
def test_checks(case: Case) -> None:
    check(SPEC, case)


@pytest.mark.parametrize(("name", "case"), OTHERS, ids=_key)
def test_others(name: str, case: Case) -> None:
    check(SPEC, case, name)


def _given(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return dict(SPEC.inputs(case, generator, torch.device("cpu")))


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda x: x.label)
@pytest.mark.parametrize("cell", kernel.STATES)
def test_every_launch_keeps_all_states(launch: Launch, cell: str) -> None:
    """More sequences than a program takes, two heads, units that fill no tile."""
    case = suite.case(cell, "fp32", (launch.meta["BM"] + 1, 2, 12, 2))
    inputs = _given(case)
    layer = kernel.Recurrence(inputs, cell, "fp32", launch)
    layer()
    truth = reference.recurrence(cell, *(inputs[k] for k in ("x", "r", "b", "first")))
    assert relative_error(layer.out, truth) < 1e-6


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 20), st.integers(1, 2), st.integers(1, 40), st.integers(1, 3))
def test_ragged(batch: int, heads: int, dim: int, steps: int) -> None:
    for cell in kernel.STATES:
        check(SPEC, suite.case(cell, "fp16", (batch, heads, dim, steps)))


@pytest.mark.parametrize("cell", kernel.STATES)
def test_reference_is_that_of_the_counted_op(cell: str) -> None:
    """The op of the counts computes the same states from the same numbers."""
    inputs = _given(suite.case(cell, "fp32", (3, 2, 5, 4)))
    found = reference.recurrence(cell, *(inputs[k] for k in ("x", "r", "b", "first")))
    op = FusedRnn(cell=cell, batch=3, num_heads=2, head_dim=5, len_seq=4)
    truth = op.reference({
        "x": inputs["x"].permute(0, 1, 3, 4, 2).double().numpy(),
        "r": inputs["r"].permute(0, 2, 3, 1).double().numpy(),
        "b": inputs["b"].permute(1, 2, 0).double().numpy(),
        "s": inputs["first"].permute(1, 2, 3, 0).double().numpy(),
    })["s"]  # fmt: skip
    assert relative_error(found.permute(1, 2, 3, 4, 0), torch.from_numpy(truth)) < 1e-12


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's word on 2^large, which is meant
@pytest.mark.parametrize("cell", kernel.STATES)
def test_large_gates_stay_finite(cell: str) -> None:
    case = suite.case(cell, "fp32", (2, 1, 16, 3))
    inputs = _given(case)
    inputs["x"] = inputs["x"] * 30
    found = SPEC.implementation("triton").prepare(case, inputs, kernel.LAUNCHES[0])()
    for out, truth in zip(found, SPEC.reference(case, inputs), strict=True):
        assert relative_error(out, truth) < 1e-4


def test_forgotten_weights_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SPEC.checks[1]
    whole = kernel.Recurrence.__init__

    def forgetful(self: kernel.Recurrence, inputs: dict[str, torch.Tensor], *more: object) -> None:
        whole(self, {**inputs, "r": inputs["r"].transpose(2, 3).contiguous()}, *more)

    monkeypatch.setattr(kernel.Recurrence, "__init__", forgetful)
    assert max(errors(SPEC, case)) > 1e-2


def test_unwritten_sequences_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.triton, "cdiv", lambda n, size: n // size)
    assert max(errors(SPEC, SPEC.checks[2])) == math.inf


def test_grid_has_launches_and_refusals_name_why() -> None:
    triton = SPEC.implementation("triton")
    for case in (*SPEC.checks, *SPEC.grid):
        for arch in (80, 90, 100):
            assert triton.launches(case, arch), case.key
    wide = suite.case("lstm", "bf16", (16, 1, 512, 4))
    assert triton.refusal(wide, 90) == "a head's weights do not stay on chip"
    many = suite.case("lstm", "bf16", (2**20, 16, 64, 4))
    assert triton.refusal(many, 90) == "more pre-activations a step than 32 bits tell apart"
    cudnn = SPEC.implementation("cudnn")
    assert cudnn.refusal(suite.case("slstm", "fp32", (1, 1, 16, 1)), 90) == "cuDNN has no sLSTM"
    several = suite.case("lstm", "fp32", (1, 2, 16, 1))
    assert cudnn.refusal(several, 90) == "cuDNN has no block-diagonal weights"


def test_binaries_have_names_of_their_own() -> None:
    found = SPEC.compilations()
    assert len({c.name for c in found}) == len(found)
    for c in found:
        assert set(c.signature) == set(c.function.arg_names), c.name

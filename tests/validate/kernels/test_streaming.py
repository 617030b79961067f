"""What streams: copies are exact, sums and maps right, nothing left out, ragged ends too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels.checking import check
from validate.kernels.judge import relative_error
from validate.kernels.spec import KernelSpec, Launch
from validate.kernels.streaming import kernel, reference, suite
from validate.record import Case

ALL = [(spec, case) for spec in suite.SPECS for case in spec.checks]
BASELINES = [(s, c) for s, c in ALL if any(i.name == "torch" for i in s.implementations)]


def _name(value: object) -> str:
    return value.key if isinstance(value, Case) else ""


@pytest.mark.parametrize(("spec", "case"), ALL, ids=_name)
def test_checks(spec: KernelSpec, case: Case) -> None:
    check(spec, case)


@pytest.mark.parametrize(("spec", "case"), BASELINES, ids=_name)
def test_baselines(spec: KernelSpec, case: Case) -> None:
    check(spec, case, "torch")


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda x: x.label)
@settings(max_examples=2, deadline=None)
@given(extra=st.integers(1, 3000))
def test_every_launch(launch: Launch, extra: int) -> None:
    """More than one block and a ragged end, in every kernel of that tile set."""
    n = launch.meta["BLOCK"] + extra
    b, c = torch.randn(n), torch.randn(n)
    assert torch.equal(kernel.prepare_copy(b, launch)()[0], b)
    (a,) = kernel.prepare_triad(b, c, 0.7, launch)()
    assert relative_error(a, reference.triad(b, c, 0.7)) < 1e-6
    for name in (*kernel.BINARY, *kernel.UNARY):
        operands = (b, c) if name in kernel.BINARY else (b,)
        (y,) = kernel.prepare_map(name, b, c if len(operands) == 2 else None, launch)()
        truth = reference.MAPS[name](*(x.double() for x in operands))
        assert relative_error(y, truth) < 1e-6, name
    x = torch.randn(3, 2 * n)
    (out,) = kernel.prepare_swiglu(x, launch)()
    assert relative_error(out, reference.gate(x)) < 1e-6


@pytest.mark.parametrize("launch", kernel.L2_LAUNCHES, ids=lambda x: x.label)
@pytest.mark.parametrize("passes", [1, 7])
def test_every_l2_launch(launch: Launch, passes: int) -> None:
    x = torch.randn(5 * kernel.SPAN + 11)
    (sums,) = kernel.prepare_l2_read(x, passes, 2, launch)()
    truth = reference.repeated_sums(x, kernel.SPAN, passes, 2)
    assert relative_error(sums, truth) < 1e-5


def test_repeated_sums_by_hand() -> None:
    """Spans 1, 2, 3 of one number, two passes a stride of one apart."""
    found = reference.repeated_sums(torch.tensor([1.0, 2.0, 3.0]), 1, 2, 1)
    assert found.tolist() == [1 + 2, 2 + 3, 3 + 1]


def test_tanh_near_zero() -> None:
    """No cancellation where tanh(x) is about x."""
    x = torch.logspace(-8, 1, 2000)
    (y,) = kernel.prepare_map("tanh", x, None, kernel.LAUNCHES[0])()
    assert float(((y.double() - x.double().tanh()) / x.double().tanh()).abs().max()) < 5e-6


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's word on 2^large, which is meant
def test_maps_of_extremes_stay_finite() -> None:
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    (gelu,) = kernel.prepare_map("gelu", x, None, kernel.LAUNCHES[0])()
    assert gelu.tolist() == [0.0, 0.0, 0.0, 100.0, 1e4]


def test_a_dropped_end_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    b = torch.randn(5000)
    monkeypatch.setattr(kernel, "_blocks", lambda n, launch: (n // launch.meta["BLOCK"],))
    (a,) = kernel.prepare_copy(b, kernel.LAUNCHES[0])()
    assert relative_error(a, b) == math.inf


def test_counts() -> None:
    copy = suite.COPY.op(Case(op="copy", dtype="fp32", params={"elements": 1000}))
    triad = suite.TRIAD.op(Case(op="triad", dtype="fp32", params={"elements": 1000}))
    assert copy.compulsory_bytes() == 8000
    assert triad.compulsory_bytes() == 12_000
    assert triad.work(2.0**20).vector_flops == 2000
    l2 = suite.L2_READ.op(Case(op="l2_read", dtype="fp32", params={"elements": 8192, "passes": 4}))
    assert l2.work(2.0**20).read_bytes == 4 * 4 * 8192


def test_rows() -> None:
    swiglu = suite.SWIGLU.checks[1]
    assert suite.SWIGLU.row is not None and suite.ELEMENTWISE.row is not None
    assert suite.SWIGLU.row(swiglu)[1:] == (
        "silu_and_mul",
        {"rows": 3, "cols": 1000, "elements": 3000},
    )
    assert suite.ELEMENTWISE.row(suite.ELEMENTWISE.checks[1])[1:] == (
        "add",
        {"elements": 1000, "inputs": 2},
    )


def test_binaries_have_names_of_their_own() -> None:
    found = [c for spec in suite.SPECS for c in spec.compilations()]
    assert len({c.name for c in found}) == len(found)
    for c in found:
        assert set(c.signature) == set(c.function.arg_names), c.name


def test_the_gate_never_runs_out_of_launches() -> None:
    for case in (*suite.SWIGLU.checks, *suite.SWIGLU.grid):
        assert suite.SWIGLU.implementation("triton").launches(case, 80)

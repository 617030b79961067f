"""Row reductions: every check, every tile set, gradients against autograd, long rows in chunks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels.checking import CPU, check
from validate.kernels.judge import relative_error
from validate.kernels.normalisation import kernel, reference, suite
from validate.kernels.spec import KernelSpec, Launch
from validate.record import Case

ALL = [(spec, case) for spec in suite.SPECS for case in spec.checks]
TIGHT = 2e-6


def _name(value: object) -> str:
    return value.key if isinstance(value, Case) else ""


@pytest.mark.parametrize(("spec", "case"), ALL, ids=_name)
def test_checks(spec: KernelSpec, case: Case) -> None:
    check(spec, case)


@pytest.mark.parametrize(("spec", "case"), ALL, ids=_name)
def test_baselines(spec: KernelSpec, case: Case) -> None:
    if spec.implementation("torch").refusal(case, 80) is None:
        check(spec, case, "torch")


@pytest.fixture
def few_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide tiles for the last sum, which other tests interpret as shipped: fewer programs."""
    monkeypatch.setattr(kernel, "SUM_COLS", 1024)
    monkeypatch.setattr(kernel, "SLICE_COLS", 2048)


def _shape_of(launch: Launch) -> tuple[int, int]:
    """Several tiles and a ragged one; columns that end inside the tile."""
    if kernel.whole(launch):
        return 2 * launch.meta["ROWS"] + 1, launch.meta["COLS"] - 7
    return 2, launch.meta["CHUNK"] + 9


@pytest.mark.parametrize(
    "launch", [*kernel.WHOLE, kernel.SOFTMAX[-1], *kernel.CHUNKED], ids=lambda x: x.label
)
def test_every_forward_launch(launch: Launch) -> None:
    rows, cols = _shape_of(launch)
    x, w, b = torch.randn(rows, cols) + 1, torch.randn(cols), torch.randn(cols)
    (y,) = kernel.prepare_softmax(x, launch)()
    assert relative_error(y, reference.softmax(x)) < TIGHT
    y, rstd = kernel.prepare_rmsnorm(x, w, launch)()
    assert relative_error(y, reference.rmsnorm(x, w)) < TIGHT
    assert relative_error(rstd, reference.rstd(x)) < TIGHT
    y, mean, rstd = kernel.prepare_layernorm(x, w, b, launch)()
    assert relative_error(y, reference.layernorm(x, w.double(), b.double())) < TIGHT
    assert relative_error(mean, x.double().mean(dim=1)) < TIGHT
    off = x.double() - x.double().mean(dim=1, keepdim=True)
    assert relative_error(rstd, reference.rstd(off)) < TIGHT


@pytest.mark.parametrize("launch", [*kernel.BACKWARD, kernel.CHUNKED[0]], ids=lambda x: x.label)
@pytest.mark.usefixtures("few_sums")
def test_every_backward_launch(launch: Launch) -> None:
    rows, cols = _shape_of(launch)
    x, w, dy = torch.randn(rows, cols), torch.randn(cols), torch.randn(rows, cols)
    y = torch.softmax(x, dim=-1)
    (dx,) = kernel.prepare_softmax_backward(y, dy, launch)()
    assert relative_error(dx, reference.softmax_backward(y, dy)) < TIGHT
    rstd = reference.rstd(x).float()
    dx, dw = kernel.prepare_rmsnorm_backward(x, w, rstd, dy, launch)()
    true_dx, true_dw = reference.rmsnorm_backward(x, w, rstd, dy)
    assert relative_error(dx, true_dx) < TIGHT
    assert relative_error(dw, true_dw) < TIGHT


def test_references_are_the_gradients() -> None:
    """The formulas against automatic differentiation in float64."""
    x = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)
    w = torch.randn(33, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, 33, dtype=torch.float64)
    y = torch.softmax(x, dim=-1)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert relative_error(reference.softmax_backward(y.detach(), dy), dx) < 1e-12
    truth = F.rms_norm(x, (33,), w, reference.EPSILON)
    dx, dw = torch.autograd.grad(truth, (x, w), dy)
    found = reference.rmsnorm_backward(x.detach(), w.detach(), reference.rstd(x.detach()), dy)
    assert relative_error(found[0], dx) < 1e-12
    assert relative_error(found[1], dw) < 1e-12


@settings(max_examples=4, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(2, 400))
def test_ragged_shapes(rows: int, cols: int) -> None:
    x, w, dy = torch.randn(rows, cols), torch.randn(cols), torch.randn(rows, cols)
    for launch in kernel.fitting(kernel.WHOLE, kernel.CHUNKED, cols):
        (y,) = kernel.prepare_softmax(x, launch)()
        assert relative_error(y, reference.softmax(x)) < TIGHT
    launch = kernel.fitting(kernel.BACKWARD, kernel.CHUNKED, cols)[0]
    rstd = reference.rstd(x).float()
    found = kernel.prepare_rmsnorm_backward(x, w, rstd, dy, launch)()
    for one, truth in zip(found, reference.rmsnorm_backward(x, w, rstd, dy), strict=True):
        assert relative_error(one, truth) < 1e-5


@pytest.mark.parametrize("launch", [kernel.WHOLE[1], kernel.CHUNKED[0]], ids=lambda x: x.label)
def test_softmax_of_masked_and_large_logits(launch: Launch) -> None:
    """Minus infinity is a probability of zero; no logit overflows."""
    x = torch.randn(3, 1000) * 1e4
    x[:, ::3] = -math.inf
    x[0] = -math.inf
    x[0, 7] = 2.0
    (y,) = kernel.prepare_softmax(x, launch)()
    assert relative_error(y, reference.softmax(x)) < TIGHT
    assert y[0, 7] == 1.0


@pytest.mark.parametrize("launch", [kernel.WHOLE[1], kernel.CHUNKED[0]], ids=lambda x: x.label)
def test_layernorm_beside_a_large_mean(launch: Launch) -> None:
    """A mean of 1000 deviations leaves the variance standing."""
    x = torch.randn(2, 1000) + 1000
    w, b = torch.ones(1000), torch.zeros(1000)
    y = kernel.prepare_layernorm(x, w, b, launch)()[0]
    assert relative_error(y, reference.layernorm(x, w.double(), b.double())) < 2e-4


def test_the_weight_gradient_is_the_same_bits_again() -> None:
    x, w, dy = torch.randn(50, 100), torch.randn(100), torch.randn(50, 100)
    rstd = reference.rstd(x).float()
    run = kernel.prepare_rmsnorm_backward(x, w, rstd, dy, kernel.BACKWARD[0])
    assert torch.equal(run()[1].clone(), run()[1])


def test_a_forgotten_tile_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that stride too far leave poison behind."""
    x, launch = torch.randn(9, 50), kernel.WHOLE[1]
    assert relative_error(kernel.prepare_softmax(x, launch)()[0], reference.softmax(x)) < TIGHT
    chunks = kernel.CHUNKED[0]
    monkeypatch.setattr(kernel.softmax, "softmax_chunks", _Short(kernel.softmax.softmax_chunks))
    found = kernel.prepare_softmax(x, chunks)()[0]
    assert relative_error(found, reference.softmax(x)) == math.inf


class _Short:
    """A kernel whose grid forgets the last row."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.kernel[(grid[0] - 1,)]


def test_fitting() -> None:
    """The tightest whole rows first; chunks for what fits no program; something for everyone."""
    first = kernel.fitting(kernel.WHOLE, kernel.CHUNKED, 1025)[0]
    assert first.meta["COLS"] == 2048
    assert all(not kernel.whole(x) for x in kernel.fitting(kernel.WHOLE, kernel.CHUNKED, 16385))
    for cols in (1, 100, 4096, 9000, 131072):
        assert kernel.fitting(kernel.BACKWARD, kernel.CHUNKED, cols)


def test_counts_and_rows() -> None:
    case = Case(op="rmsnorm", dtype="bf16", params={"rows": 4, "cols": 256})
    assert suite.RMSNORM.op(case).compulsory_bytes() == 2 * 4 * 256 * 2 + 256 * 2 + 4 * 4
    assert suite.RMSNORM.row is not None
    assert suite.RMSNORM.row(case) == (
        "elementwise",
        "rmsnorm",
        {"rows": 4, "cols": 256, "elements": 1024},
    )
    assert suite.SOFTMAX_BACKWARD.row is None


def test_binaries_have_names_of_their_own() -> None:
    found = [c for spec in suite.SPECS for c in spec.compilations()]
    assert len({c.name for c in found}) == len(found)
    for c in found:
        assert set(c.signature) == set(c.function.arg_names), c.name


def test_inputs_are_never_zero() -> None:
    for spec in suite.SPECS:
        made = spec.inputs(spec.checks[-1], torch.Generator().manual_seed(0), CPU)
        assert all(float(t.float().abs().max()) > 0 for t in made.values()), spec.name

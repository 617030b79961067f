"""The 2:4 product: pruning, counts, refusals; torch's sparse kernels need a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import dtypes
from hwmodels.errors import InputError
from tests.validate.kernels.checking import CPU, check
from validate.kernels.sparse_gemm import suite
from validate.kernels.sparse_gemm.reference import product, pruned
from validate.record import Case

(SPEC,) = suite.SPECS


@pytest.mark.parametrize("case", SPEC.checks, ids=lambda c: c.key)
def test_dense_baseline(case: Case) -> None:
    check(SPEC, case, "torch")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", SPEC.checks, ids=lambda c: c.key)
def test_sparse(case: Case) -> None:
    inputs = SPEC.inputs(case, torch.Generator().manual_seed(0), torch.device("cuda"))
    (out,) = SPEC.implementation("torch-2to4").prepare(case, inputs, None)()
    truth = product(inputs["a"], inputs["w"])
    error = (out.double() - truth).norm() / truth.norm()
    assert float(error) <= SPEC.tolerances[case.dtype]


def test_pruning_by_hand() -> None:
    w = torch.tensor([[1.0, -4.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0]])
    assert pruned(w).tolist() == [[0.0, -4.0, 0.0, 3.0, 5.0, 5.0, 0.0, 0.0]]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 6), groups=st.integers(1, 9), seed=st.integers(0, 99))
def test_pruning_keeps_the_two_largest(rows: int, groups: int, seed: int) -> None:
    w = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed))
    kept = pruned(w).reshape(-1, 4)
    assert bool((kept.ne(0).sum(dim=1) == 2).all())
    largest = w.reshape(-1, 4).abs().topk(2, dim=1).values.sum(dim=1)
    assert torch.allclose(kept.abs().sum(dim=1), largest)


def test_inputs_are_pruned() -> None:
    case = SPEC.checks[1]
    w = SPEC.inputs(case, torch.Generator().manual_seed(0), CPU)["w"]
    assert torch.equal(pruned(w), w)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    case = suite.case(16, 64, 128)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.refusal(case, 90) == "2:4 products need a CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert suite.refusal(case, 75) == "2:4 products need compute capability 8.0"
    assert suite.refusal(case, 90) is None
    assert suite.refusal(suite.case(16, 40, 128), 90) is not None
    assert suite.refusal(suite.case(16, 64, 128, "fp32"), 90) is not None


def test_counts() -> None:
    """Half the products; half the weight, and two bits for the place of each kept value."""
    work = suite.op(suite.case(16, 32, 64)).work(1.0)
    assert work.tensor_flops == {dtypes.BF16: 16 * 32 * 64}
    assert work.bytes == 2 * 16 * 64 + 32 * 32 * 2.25 + 2 * 16 * 32
    with pytest.raises(InputError, match="multiple of 4"):
        suite.SparseMatmul(m=1, n=1, k=6)


def test_no_binaries_of_ours() -> None:
    assert SPEC.compilations() == ()
